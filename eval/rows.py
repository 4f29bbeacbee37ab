"""Results as rows of committed CSV files, written as `python -m sf_mllm.bench` writes a user's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sf_mllm.bench import rows as files

RESULTS = Path(__file__).parent / "results"


def append_rows(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    device: str,
    directory: Path = RESULTS,
    num_devices: int = 1,
) -> Path:
    """Append rows to `<directory>/<benchmark>.csv`, with the provenance of this process in the last columns.

    Args:
        benchmark: name of the file.
        rows: with equal columns.
        device: torch device that did the work, for example "cuda" or "cpu".
        directory: of the file.
        num_devices: how many such GPUs did the work.

    Raises:
        InputError: the rows have other columns than the file.
    """
    provenance = files.describe_provenance(device)
    if num_devices > 1 and device.startswith("cuda"):
        provenance["device"] = f"{num_devices} x {provenance['device']}"
    return append_complete_rows(benchmark, [{**row, **provenance} for row in rows], directory)


def append_complete_rows(benchmark: str, rows: Sequence[Mapping[str, Any]], directory: Path = RESULTS) -> Path:
    """Append rows that bring their provenance along.

    Raises:
        InputError: the rows have other columns than the file.
    """
    path = directory / f"{benchmark}.csv"
    files.append_rows(path, rows)
    return path
