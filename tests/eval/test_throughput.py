import csv

import pytest

from eval import throughput
from eval.throughput import TABLES, main
from sf_mllm.bench.arguments import parse_arguments
from sf_mllm.bench.chat_models import find_chat_model
from sf_mllm.bench.towers import find_tower


@pytest.mark.parametrize("table", TABLES)
def test_every_table_names_what_there_is(table):
    options = parse_arguments(TABLES[table])
    for name in getattr(options, "towers", ()):
        find_tower(name)
    for name in getattr(options, "models", ()):
        find_chat_model(name)
    assert options.device == ("cuda" if table.startswith("gpu") else "cpu")
    assert options.rows is None


def test_tables_are_command_lines_of_the_benchmark(saved_model, tmp_path, monkeypatch):
    monkeypatch.setattr("sf_mllm.bench.run._quiet_libraries", lambda: None)
    monkeypatch.setitem(TABLES, "cpu", ("encoder", str(saved_model), "--repeats", "2", "--device", "cpu"))
    assert main(["cpu", "--rows", str(tmp_path)]) == 0
    with (tmp_path / "throughput.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == str(saved_model) and row["protocol"] == "encoder-speed-1"


def test_the_worst_status_counts_and_bad_names_are_refused(monkeypatch, capsys):
    statuses = iter([1, 0])
    monkeypatch.setattr(throughput, "run_bench", lambda arguments: next(statuses))
    assert main(["cpu", "startup"]) == 1
    assert main(["cup"]) == 2
    assert "invalid choice: 'cup'" in capsys.readouterr().err
