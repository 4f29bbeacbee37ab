import csv

import pytest

from sf_mllm.bench import chat, conditions, encoder
from sf_mllm.bench import run as bench_run
from sf_mllm.bench.__main__ import main
from sf_mllm.bench.arguments import COMMANDS, parse_arguments
from sf_mllm.bench.lines import describe_row
from sf_mllm.bench.rows import Row, append_rows
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.timing import Spread
from sf_mllm.errors import InputError

QUICK = ["--repeats", "2", "--seconds", "1"]


@pytest.fixture(autouse=True)
def other_tests_hear_the_libraries(monkeypatch):
    monkeypatch.setattr(bench_run, "_quiet_libraries", lambda: None)


@pytest.fixture
def model_directory(saved_model):
    return str(saved_model)


def read_rows(folder):
    with (folder / "throughput.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_say_where_when_and_how(model_directory, tmp_path, capsys):
    command = ["encoder", model_directory, *QUICK, "--size", "64", "96x32", "--rows", str(tmp_path)]
    assert main(command) == 0
    assert main(["preprocess", model_directory, *QUICK, "--rows", str(tmp_path)]) == 0
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == ["encoder", "encoder", "decode", "preprocess"]
    assert [(row["width"], row["height"]) for row in rows[:2]] == [("64", "64"), ("96", "32")]
    for row in rows:
        assert row["device"].startswith("CPU ") and row["command"] and row["date"] and row["torch"]
        assert float(row["time_ms_q25"]) <= float(row["time_ms"]) <= float(row["time_ms_q75"])
        assert row["outcome"] == "complete" and row["images"] == "drawings"
    said = capsys.readouterr().out
    assert "encoder, batch 1, float32, eager\n" in said and "6 tokens" in said and str(tmp_path) in said
    assert "Random weights" not in said


def test_wrong_results_and_failures_are_the_exit_status(monkeypatch, capsys):
    outcomes = iter(["out of memory", "wrong: relative error 1 against eager float32, at most 0.1 passes"])
    monkeypatch.setitem(
        bench_run._COMMANDS, "encoder", lambda *_: [Row("p", "encoder", "x", weights="random", outcome=next(outcomes))]
    )
    assert main(["encoder"]) == 0
    assert main(["encoder"]) == 1
    said = capsys.readouterr().out
    assert "wrong: relative error 1" in said and "Random weights cost what trained ones cost" in said


@pytest.mark.parametrize("command", [["chat", "random:sparseformer-tiny"], ["encoder", "sparseformer:base"]])
def test_a_lost_device_ends_the_command_with_the_row_of_what_took_it(command, tmp_path, monkeypatch, capsys):
    """As an assertion in a CUDA kernel does: all further calls fail."""
    is_lost = []

    def fail(*_, **__):
        is_lost.append(True)
        raise RuntimeError("device-side assert triggered")

    def wait(device):
        if is_lost:
            raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(chat, "_check_answer", fail)
    monkeypatch.setattr(encoder, "prepare_variant", fail)
    monkeypatch.setattr(conditions, "wait", wait)
    assert main([*command, *QUICK, "--rows", str(tmp_path)]) == 1
    (row,) = read_rows(tmp_path)
    assert row["outcome"] == "failed: RuntimeError: device-side assert triggered" and row["step"]
    said = capsys.readouterr().err
    assert f"error: After this failure of '{command[1]}' the device takes no more work" in said


def test_other_rows_are_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "throughput.csv").write_text("model,speed\n")
    monkeypatch.setitem(bench_run._COMMANDS, "encoder", lambda *_: pytest.fail("measured"))
    assert main(["encoder", "--rows", str(tmp_path)]) == 2
    assert "has the columns ['model', 'speed']" in capsys.readouterr().err


def test_without_a_command_there_is_a_bit_of_each():
    assert parse_arguments([]).command == "all"
    options = parse_arguments(["--threads", "2"])
    assert (options.command, options.threads) == ("all", 2)


def test_overview_measures_all_parts(model_directory, monkeypatch):
    monkeypatch.setattr(bench_run, "DEFAULT_TOWERS", (model_directory,))
    monkeypatch.setattr(bench_run, "DEFAULT_CHATS", (model_directory,))
    monkeypatch.setattr(bench_run, "measure_startup", lambda *_, **__: [Row("p", "start", "x", outcome="complete")])
    monkeypatch.setattr(bench_run, "describe_row", lambda row, width: row.step)
    steps = []
    monkeypatch.setattr(bench_run, "describe_group", lambda row: steps.append(row.step) or "")
    assert main(QUICK) == 0
    assert list(dict.fromkeys(steps)) == [
        *("decode", "preprocess", "encoder", "chat preprocess", "chat encoder", "first token", "next token", "start")
    ]


def test_defaults_of_the_options():
    options = parse_arguments(["encoder"])
    assert options.towers == ["sparseformer:base", "open_clip:ViT-B-16-quickgelu"]
    assert (options.size, options.batch, options.precision, options.mode) == ([None], [1], ["float32"], ["eager"])
    assert parse_arguments(["encoder", "--size", "own", "1792x224"]).size == [None, ImageSize(1792, 224)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encodr"], "Command 'encodr' is unknown. Did you mean 'encoder'?"),
        (["encoder", "--size", "10"], "Size '10' cannot be used; give a side such as 224"),
        (["encoder", "--batch", "0"], "--batch: must be a whole number, at least 1, got '0'"),
        (["encoder", "--precision", "half"], "invalid choice: 'half'"),
        (["encoder", "--mode", "fast"], "invalid choice: 'fast'"),
        (["encoder", "--seconds", "nan"], "must be a number of seconds above 0, got 'nan'"),
        (["encoder", "sparsformer:base"], "Did you mean 'sparseformer:base'?"),
        (["encoder", "--device", "cpux"], "Device 'cpux' is unknown."),
        (["encoder", "--images", "/nowhere"], "Image folder '/nowhere' does not exist"),
        (["chat", "--new-tokens", "1"], "at least 2, got '1'"),
        (["startup", "--batch", "1"], "Unrecognized arguments: --batch 1"),
        (["plot", "/nowhere.csv"], "'/nowhere.csv' cannot be read: No such file or directory"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert not end.value.code and "usage: python -m sf_mllm.bench" in capsys.readouterr().out


def test_a_line_has_the_figures_of_its_row():
    row = Row("p", "encoder", "a", weights="random", visual_tokens=49, width=224, height=112)
    row.add_times(Spread((1234.5678, 1000.0, 2000.0)), Spread((617.2839, 500.0, 1000.0)), "b")
    row.images_per_s = 12.3456
    assert describe_row(row, 3) == (
        "  a   random  224x112, 49 tokens, 1235 ms (1117 to 1617), 12.3 images/s, 2 times b (2 to 2)"
    )
    row.outcome = "out of memory"
    assert describe_row(row, 3) == "  a   random  224x112, 49 tokens, out of memory"


def test_rows_are_appended_and_never_replaced(tmp_path):
    path = tmp_path / "deep" / "a.csv"
    append_rows(path, [{"a": 1}])
    append_rows(path, [{"a": 2}, {"a": 3}])
    assert path.read_text().split() == ["a", "1", "2", "3"]
    with pytest.raises(InputError, match="use another file"):
        append_rows(path, [{"b": 1}])
