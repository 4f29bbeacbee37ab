"""What is measured, as rows of CSV files: appended, never overwritten, each with what is needed to repeat it."""

import csv
import datetime
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from sf_mllm.bench.timing import Spread
from sf_mllm.errors import InputError
from sf_mllm.training.environment import describe_revision

FILE = "throughput.csv"
"""Name of the file that `python -m sf_mllm.bench --rows FOLDER` appends to."""
COMPLETE, OUT_OF_MEMORY, NO_PROCESSOR = "complete", "out of memory", "no image processor"
LOST_IN_NOISE = "lost in noise, more rounds or tokens are needed"
"""Outcomes of what could be measured, of what does not fit, of what has no such part, and of a difference of times that
is not above zero; others are failures."""

Value = float | int | str
"""Of a cell; "" where there is nothing to say."""


@dataclass
class Row:
    """One measured step of one model. Times are of one call, on the whole batch."""

    protocol: str
    """What was done, described in eval/README.md."""
    step: str
    """What is timed."""
    model: str
    """Name on the command line."""
    weights: str = ""
    """"random", or where trained ones come from."""
    parameters_m: Value = ""
    """Millions."""
    visual_tokens: Value = ""
    """Tokens of an image that a language model reads."""
    width: Value = ""
    """Of the image, in pixels."""
    height: Value = ""
    prompt_tokens: Value = ""
    """Tokens of the whole prompt, visual ones included."""
    batch: Value = ""
    """Images, or conversations, of one call."""
    precision: str = ""
    mode: str = ""
    threads: Value = ""
    """Of the CPU, used by PyTorch."""
    images: str = ""
    """"drawings", or the folder of the user's images."""
    outcome: str = COMPLETE
    """One of those above, or what went wrong."""
    relative_error: Value = ""
    """Distance from the same weights in eager float32, of a tower's reference if it has one, over the length of that
    output."""
    time_ms: Value = ""
    """Median."""
    time_ms_q25: Value = ""
    time_ms_q75: Value = ""
    repeats: Value = ""
    """Calls that were timed."""
    images_per_s: Value = ""
    tokens_per_s: Value = ""
    ratio_to: str = ""
    """The model that this one was called in turns with."""
    time_ratio: Value = ""
    """Median, over rounds, of this model's time over that one's."""
    time_ratio_q25: Value = ""
    time_ratio_q75: Value = ""
    weights_gib: Value = ""
    peak_memory_gib: Value = ""
    """On a GPU: of this model's weights, inputs and intermediate results; of a process of its own: all that it held."""

    def add_times(self, times: Spread, first: Spread | None = None, ratio_to: str = "") -> None:
        """Fill in the median and the quartiles.

        Args:
            times: of this model, in ms.
            first: of another model, called in turns with this one.
            ratio_to: its name.
        """
        self.time_ms, self.time_ms_q25, self.time_ms_q75 = _round_spread(times)
        self.repeats = len(times.samples)
        if first is not None:
            self.ratio_to = ratio_to
            self.time_ratio, self.time_ratio_q25, self.time_ratio_q75 = _round_spread(times.over(first))

    def to_record(self, provenance: Mapping[str, str]) -> dict[str, Any]:
        """Return the cells by column, with where and when they were measured in the last ones."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | dict(provenance)


def describe_provenance(device: str) -> dict[str, str]:
    """Return where, with what and by which command a row was measured.

    Args:
        device: torch device that did the work, for example "cuda" or "cpu".
    """
    is_cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if is_cuda else f"{device.upper()} {_processor_name()}"
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "revision": _revision(),
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join([*program, *sys.argv[1:]])}",
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows, which bring their provenance along, to a CSV file.

    Raises:
        InputError: the rows have other columns than the file.
    """
    columns = list(rows[0])
    refuse_other_columns(path, columns)
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def refuse_other_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise if rows with these columns cannot be appended to a file.

    Raises:
        InputError: the file has others.
    """
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            existing = next(csv.reader(file), [])
        if existing != list(columns):
            raise InputError(f"{path} has the columns {existing}, the new rows have {list(columns)}; use another file.")


def round_to(value: float, digits: int = 4) -> float:
    """Keep significant digits; more would claim a precision that no measurement has."""
    return float(f"{value:.{digits}g}")


def _round_spread(spread: Spread) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, high = spread.quartiles
    return round_to(spread.median), round_to(low), round_to(high)


def _processor_name() -> str:
    """Return the processor's name where the system tells it, and its kind."""
    cpu_info = Path("/proc/cpuinfo")
    names = [platform.processor()]
    if cpu_info.is_file():
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(dict.fromkeys(word for word in (*names[:1], platform.machine()) if word))


def _revision() -> str:
    """Short git revision, "+" behind it if the tree has changes; "unknown" outside a checkout."""
    found = describe_revision()
    return found["revision"][:7] + "+" * found["revision_is_dirty"] if found["revision"] else "unknown"
