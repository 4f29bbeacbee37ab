"""Results as rows of committed CSV files, written as `python -m sf_mllm.bench` writes a user's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sf_mllm.bench import rows as files

RESULTS = Path(__file__).parent / "results"


def append_rows(benchmark: str, rows: Sequence[Mapping[str, Any]], device: str, directory: Path = RESULTS) -> Path:
    """Append rows to `<directory>/<benchmark>.csv`, with the provenance of this process in the last columns.

    Args:
        benchmark: name of the file.
        rows: with equal columns.
        device: torch device that did the work, for example "cuda" or "cpu".
        directory: of the file.

    Raises:
        InputError: the rows have other columns than the file.
    """
    return append_complete_rows(benchmark, [{**row, **files.describe_provenance(device)} for row in rows], directory)


def append_complete_rows(benchmark: str, rows: Sequence[Mapping[str, Any]], directory: Path = RESULTS) -> Path:
    """Append rows that bring their provenance along.

    Raises:
        InputError: the rows have other columns than the file.
    """
    path = directory / f"{benchmark}.csv"
    files.append_rows(path, rows)
    return path
