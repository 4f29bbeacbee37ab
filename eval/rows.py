"""Results as rows of committed CSV files: appended, never overwritten, each with what is needed to repeat it."""

import csv
import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
PROVENANCE = ("device", "torch", "transformers", "python", "revision", "date", "command")


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
    """Append rows to `<directory>/<benchmark>.csv`, with provenance in the last columns.

    Raises:
        ValueError: the rows have other columns than the file.
    """
    path = directory / f"{benchmark}.csv"
    complete = [{**row, **provenance(device)} for row in rows]
    columns = list(complete[0])
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
        writer.writerows(complete)
    return path


def _revision() -> str:
    """Short git revision, "+" behind it if the tree has changes; "unknown" outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        revision = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+" if dirty else "")
