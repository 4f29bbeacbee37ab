"""How long a user waits for the chat: from the command to its help, to the first word of an answer, to its end.

Protocol `startup-speed-1`: `python -m sf_mllm.cli` as a process of its own, imports and loading included, after one
that does not count, so that files are in the system's cache. Memory is the most that the process held at a time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from sf_mllm.assets import DEMO_ROOT
from sf_mllm.bench.chat_models import QUESTION
from sf_mllm.bench.rows import Row, Value
from sf_mllm.bench.stopwatch import ProcessTimes
from sf_mllm.bench.timing import Spread, to_gib
from sf_mllm.errors import InputError

PROTOCOL = "startup-speed-1"
HELP, FIRST_WORD, WHOLE = "start to help", "start to first word", "start to end of answer"
_EXAMPLE = DEMO_ROOT / "example.png"


def measure_startup(
    model: str,
    *,
    repeats: int,
    device: str | None = None,
    image: Path | None = None,
    question: str | None = None,
) -> Iterator[Row]:
    """Yield a row for the help, the first word and the whole answer.

    Args:
        model: "demo", or what the chat takes as --model.
        repeats: runs of each command.
        device: of the chat; None: its own choice.
        image: to ask about; None: the shipped example.
        question: to ask; None: a short one.

    Raises:
        InputError: the chat fails.
    """
    path = "demo:sf_llava" if model == "demo" else model
    ask = ["--model", path, "--image", str(image or _EXAMPLE), "--prompt", QUESTION if question is None else question]
    if device is not None:
        ask += ["--device", device]
    for arguments, steps in ((["--help"], (HELP,)), (ask, (FIRST_WORD, WHOLE))):
        runs = [run_chat(arguments) for _ in range(1 + repeats)][1:]
        peak: Value = to_gib(median(run.peak_bytes for run in runs))
        for step in steps:
            times = [run.first_output_ms if step == FIRST_WORD else run.end_ms for run in runs]
            row = Row(PROTOCOL, step, model, weights=path, batch=1, threads=torch.get_num_threads())
            row.images = "example.png" if image is None else str(image)
            row.peak_memory_gib = peak
            row.add_times(Spread(tuple(times)))
            yield row


def run_chat(arguments: Sequence[str]) -> ProcessTimes:
    """Start the chat and read what it says.

    Raises:
        InputError: it fails; with its own words.
    """
    root = str(Path(__file__).parents[2])  # of this package, wherever the command was typed
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    python = [sys.executable, "-m"]
    command = [*python, "sf_mllm.bench.stopwatch", *python, "sf_mllm.cli", *arguments]
    watched = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    times = ProcessTimes(**json.loads(watched.stdout))
    if times.status:
        said = times.errors.strip().splitlines() or ["it said nothing."]
        raise InputError(f"The chat failed: {said[-1].removeprefix('error: ')}")
    return times
