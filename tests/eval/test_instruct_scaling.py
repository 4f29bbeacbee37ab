import csv
import json
import signal
import sys

import pytest

from eval import instruct_scaling
from eval.instruct_scaling import _run, draw_rows, main
from sf_mllm.training.instruct import __main__ as instruct


@pytest.mark.parametrize("phase", ["instruct", "align"])
def test_each_arrangement_is_compared_with_the_first(phase, tmp_path, monkeypatch):
    """In place of two processes one accumulates, and one learns faster than it should."""
    launched = []

    def run_in_this_process(processes, strategy, arguments, folder, kill_at):
        launched.append((strategy, kill_at))
        changes = ["train.gradient_accumulation_steps=2", "train.logging_steps=1"]
        changes += ["lora.rank=2"] if phase == "instruct" else []
        if strategy == "zero3":
            changes.append("train.learning_rate=0.002")
        kept = [argument for argument in arguments if not argument.startswith("train.deepspeed=")]
        assert instruct.main([*kept, *changes]) == 0
        return "complete"

    monkeypatch.setattr(instruct_scaling, "launch", run_in_this_process)
    arguments = ["--micro-batch", "1", "--global-batch", "2", "--steps", "4", "--kill", "--strategy", "ddp", "zero3"]
    assert main([*arguments, "--phase", phase, "--work", str(tmp_path), "--rows", str(tmp_path)]) == 0
    assert launched == [("none", None), ("ddp", 2), ("zero3", 2)]
    with (tmp_path / "instruct_scaling.csv").open() as file:
        one, same, other = csv.DictReader(file)
    assert {row["phase"] for row in (one, same, other)} == {phase}
    assert [(row["accumulation"], row["killed_at_step"]) for row in (one, same, other)] == [
        ("2", ""), ("1", "2"), ("1", "2"),
    ]  # fmt: skip
    assert one["loss_difference"] == one["weight_difference"] == ""
    assert float(same["loss_difference"]) == float(same["weight_difference"]) == 0.0
    assert float(other["loss_difference"]) > 1e-4 and float(other["weight_difference"]) > (
        0.1 if phase == "instruct" else 0.001
    )


def test_a_tenth_of_the_rows_is_text_only(tmp_path):
    rows = json.loads((draw_rows(tmp_path / "scenes", 20) / "rows.json").read_text())
    assert [index for index, row in enumerate(rows) if "image" not in row] == [9, 19]
    for row in rows:
        assert ("<image>" in row["conversations"][0]["value"]) == ("image" in row)


def test_a_run_is_killed_at_a_step_with_all_that_it_started(tmp_path):
    """Its child would write another line a second later."""
    metrics, child = tmp_path / "metrics.jsonl", "import time; time.sleep(1); open('{}', 'a').write('late')"
    parent = "import subprocess, sys; open(sys.argv[1], 'w').write('1\\n2\\n'); subprocess.run([sys.executable, '-c', "
    command = [sys.executable, "-c", parent + "sys.argv[2]])", str(metrics), child.format(metrics)]
    assert _run(command, tmp_path / "log.txt", metrics, kill_at=2) == -signal.SIGKILL
    assert _run([sys.executable, "-c", "import time; time.sleep(1.2)"], tmp_path / "log.txt", metrics, None) == 0
    assert metrics.read_text() == "1\n2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batch", "3"], "--global-batch 16 cannot be shared out to 1 processes in micro-batches of 3"),
        (["--steps", "3"], "--steps 3 is too few"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
