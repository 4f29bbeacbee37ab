"""One training run on one process and on several: what the measurements of both stages have in common."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sf_mllm.errors import InputError

ROOT = Path(__file__).parents[1]


def check_arrangements(process_counts: Sequence[int], micro_batch: int, global_batch: int, steps: int) -> None:
    """Refuse numbers with which not every arrangement would take the same steps.

    Raises:
        InputError: names the option to change.
    """
    for count in process_counts:
        if count < 1 or micro_batch < 1 or global_batch % (count * micro_batch):
            raise InputError(
                f"--global-batch {global_batch} cannot be shared out to {count} processes in micro-batches of "
                f"{micro_batch}; give a multiple of both."
            )
    if steps < 4:
        raise InputError(f"--steps {steps} is too few; give at least 4.")


def find_device(process_counts: Sequence[int]) -> str:
    """Return "cuda" if there is a GPU for each process, "cpu" if there is none at all.

    Raises:
        InputError: there are some, but too few.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if max(process_counts) > torch.cuda.device_count():
        raise InputError(f"--processes {max(process_counts)} needs as many GPUs, found {torch.cuda.device_count()}.")
    return "cuda"


def list_arrangements(process_counts: Sequence[int], strategies: Sequence[str]) -> list[tuple[int, str]]:
    """List (processes, strategy); one process alone needs no strategy."""
    several = [(count, strategy) for count in process_counts if count > 1 for strategy in strategies]
    return [(1, "none")] * (1 in process_counts) + several


def deepspeed_settings(strategy: str, folder: Path, *, autocast: bool) -> Path:
    """Return the shipped DeepSpeed configuration of "zero2" or "zero3"; for runs in fp32 a copy without autocast."""
    shipped = ROOT / "configs" / "deepspeed" / f"{strategy}.json"
    if autocast:
        return shipped
    settings = json.loads(shipped.read_text(encoding="utf-8"))
    settings["torch_autocast"]["enabled"] = False
    path = folder / f"{strategy}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def python_on(processes: int) -> list[str]:
    """Return the beginning of a command that runs a module, whose name comes next, on so many processes."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return command
