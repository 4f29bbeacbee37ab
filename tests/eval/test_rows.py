"""Result files grow, and refuse rows of another kind."""

import csv
from pathlib import Path

import pytest

from eval.rows import RESULTS, append_rows
from sf_mllm.bench.rows import describe_provenance


def test_rows_are_appended_with_their_provenance(tmp_path: Path) -> None:
    append_rows("bench", [{"metric": "a", "value": 1}], "cpu", tmp_path)
    path = append_rows("bench", [{"metric": "b", "value": 2}, {"metric": "c", "value": 3}], "cpu", tmp_path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == ["a", "b", "c"]
    assert all(row[column] for row in rows for column in describe_provenance("cpu"))


def test_other_columns_are_refused(tmp_path: Path) -> None:
    append_rows("bench", [{"metric": "a", "value": 1}], "cpu", tmp_path)
    with pytest.raises(ValueError, match="columns"):
        append_rows("bench", [{"name": "a", "value": 1}], "cpu", tmp_path)


def test_only_a_cpu_is_called_one():
    on_cpu, on_apple = (describe_provenance(device)["device"] for device in ("cpu", "mps"))
    assert on_cpu.startswith("CPU ") and on_apple.startswith("MPS ")
    assert on_cpu.removeprefix("CPU ") == on_apple.removeprefix("MPS ")


def test_committed_results_are_whole_tables():
    files = sorted(RESULTS.glob("*.csv"))
    assert files
    for path in files:
        text = path.read_bytes().decode()
        assert "\r" not in text and text.endswith("\n"), path.name
        header, *rows = csv.reader(text.splitlines())
        assert rows and all(len(row) == len(header) for row in rows), path.name
        assert {"date", "command"} <= set(header), path.name
