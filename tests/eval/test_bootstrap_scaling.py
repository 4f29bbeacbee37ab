import csv
import json

import pytest
import torch

from eval import bootstrap_scaling
from eval.bootstrap_scaling import main
from eval.scaling import ROOT
from sf_mllm.training.bootstrap import __main__ as bootstrap

REHEARSAL = ["--size", "tiny", "--no-compile", "--steps", "4", "--files", "8", "--file-size", "64"]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(bootstrap_scaling, "count_cores", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_each_arrangement_is_compared_with_the_first(tmp_path, monkeypatch):
    """In place of two processes one accumulates, and one learns faster than it should."""
    launched = []

    def run_in_this_process(processes, arguments, log):
        launched.append((processes, arguments))
        accumulation = {1: 2, 2: 2 if len(launched) == 2 else 1}[processes]
        changes = [f"train.gradient_accumulation_steps={accumulation}", "train.dataloader_num_workers=0"]
        if len(launched) == 3:
            changes.append("train.learning_rate=0.002")
        kept = [argument for argument in arguments if not argument.startswith("train.deepspeed=")]
        assert bootstrap.main([*kept, *changes]) == 0
        return "complete"

    monkeypatch.setattr(bootstrap_scaling, "launch", run_in_this_process)
    arguments = ["--micro-batch", "1", "--global-batch", "2", "--work", str(tmp_path), "--rows", str(tmp_path)]
    assert main([*REHEARSAL, *arguments]) == 0
    with (tmp_path / "bootstrap_scaling.csv").open() as file:
        one, same, other = csv.DictReader(file)
    assert [(row["processes"], row["strategy"], row["accumulation"]) for row in (one, same, other)] == [
        ("1", "none", "2"), ("2", "ddp", "1"), ("2", "zero2", "1"),
    ]  # fmt: skip
    assert one["loss_difference"] == one["weight_difference"] == one["speedup"] == ""
    assert float(same["loss_difference"]) == float(same["weight_difference"]) == 0.0
    assert float(other["weight_difference_mean"]) > 0.2 and float(other["loss_difference"]) > 1e-3
    assert float(same["speedup"]) == pytest.approx(float(same["images_per_s"]) / float(one["images_per_s"]), abs=1e-3)
    (deepspeed,) = [argument for argument in launched[2][1] if argument.startswith("train.deepspeed=")]
    settings = json.loads(open(deepspeed.partition("=")[2]).read())
    shipped = json.loads((ROOT / "configs/deepspeed/zero2.json").read_text())
    assert settings["zero_optimization"] == shipped["zero_optimization"]
    assert settings["torch_autocast"]["enabled"] == torch.cuda.is_available()


def test_what_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap_scaling, "launch", lambda *args, **kwargs: "failed with exit status 1")
    arguments = ["--processes", "1", "--micro-batch", "1", "--global-batch", "2", "--rows", str(tmp_path)]
    assert main([*REHEARSAL, *arguments]) == 0
    with (tmp_path / "bootstrap_scaling.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["outcome"] == "failed with exit status 1" and row["images_per_s"] == ""


def test_a_command_that_fails_says_why(tmp_path, capfd):
    outcome = bootstrap_scaling.launch(1, ["/nowhere.yaml"], log=tmp_path / "log.txt")
    assert outcome == "failed with exit status 2"
    assert "Config file '/nowhere.yaml' does not exist" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "3"], "--global-batch 1024 cannot be shared out to 3 processes in micro-batches of 8"),
        (["--steps", "2"], "--steps 2 is too few"),
        (["--strategy", "zero3"], "invalid choice: 'zero3'"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    assert main(["--size", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
