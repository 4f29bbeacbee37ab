"""Results as rows of committed CSV files: appended, never overwritten, each with what is needed to repeat it."""

import csv
import datetime
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sf_mllm.training.environment import describe_revision

RESULTS = Path(__file__).parent / "results"


def provenance(device: str) -> dict[str, str]:
    """Return where, with what and by which command a row was measured.

    Args:
        device: torch device that did the work, for example "cuda" or "cpu".
    """
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU {platform.machine()}"
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "revision": _revision(),
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join([*program, *sys.argv[1:]])}",
    }


def append_rows(benchmark: str, rows: Sequence[Mapping[str, Any]], device: str, directory: Path = RESULTS) -> Path:
    """Append rows to `<directory>/<benchmark>.csv`, with the provenance of this process in the last columns.

    Raises:
        ValueError: the rows have other columns than the file.
    """
    return append_complete_rows(benchmark, [{**row, **provenance(device)} for row in rows], directory)


def append_complete_rows(benchmark: str, rows: Sequence[Mapping[str, Any]], directory: Path = RESULTS) -> Path:
    """Append rows that bring their provenance along.

    Raises:
        ValueError: the rows have other columns than the file.
    """
    path = directory / f"{benchmark}.csv"
    columns = list(rows[0])
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            existing = next(csv.reader(file))
        if existing != columns:
            raise ValueError(f"{path} has the columns {existing}, the new rows have {columns}; use another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _revision() -> str:
    """Short git revision, "+" behind it if the tree has changes; "unknown" outside a checkout."""
    found = describe_revision()
    return found["revision"][:7] + "+" * found["revision_is_dirty"] if found["revision"] else "unknown"
