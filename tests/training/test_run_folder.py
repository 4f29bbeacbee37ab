import importlib.util
import json
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
import torch
from transformers import Trainer, TrainerCallback

from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.progress import report_progress
from sf_mllm.training.run_folder import RunFolder, write_directory_atomically


@dataclass
class Section:
    rate: float = 0.5


@dataclass
class Config:
    output_dir: str = "x"
    section: Section = field(default_factory=Section)
    train: dict = field(default_factory=lambda: {"max_steps": 6})


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(run, kill_at=None):
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "bf16": False}
    torch.manual_seed(0)
    trainer = Trainer(
        model=Line(),
        args=make_training_arguments(settings, run.checkpoints, seed=0),
        train_dataset=[{"x": torch.tensor([float(i), 1.0])} for i in range(16)],
        callbacks=[KillAt(kill_at)],
    )
    report_progress(trainer, run)
    trainer.train(resume_from_checkpoint=run.find_last_checkpoint())
    return trainer.model.state_dict()


def read_rows(run):
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def test_the_same_configuration_goes_on_and_another_is_refused(tmp_path):
    run = RunFolder.open(Config(), tmp_path / "run")
    RunFolder.open(Config(output_dir="moved"), tmp_path / "run")
    (run.checkpoints / "checkpoint-2").mkdir()
    with pytest.raises(InputError, match=r"section\.rate \(was 0\.5, now 0\.25\), train\.max_steps \(was 6, now 7\);"):
        RunFolder.open(Config(section=Section(0.25), train={"max_steps": 7}), tmp_path / "run")


def test_a_start_that_trained_nothing_may_be_corrected(tmp_path):
    run = RunFolder.open(Config(), tmp_path / "run")
    with pytest.raises(InputError), run.recording():
        raise InputError("a path was mistyped")
    run.update_record(data="of the mistyped path")
    again = RunFolder.open(Config(section=Section(0.25)), tmp_path / "run")
    assert again.record == {}
    assert "rate: 0.25" in again.config_file.read_text()


def test_a_complete_run_keeps_its_configuration_without_checkpoints(tmp_path):
    run = RunFolder.open(Config(), tmp_path)
    with run.recording():
        pass
    with pytest.raises(InputError, match="another configuration"):
        RunFolder.open(Config(section=Section(0.25)), tmp_path)


def test_a_file_in_the_place_of_the_folder_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.open(Config(), tmp_path / "file" / "run")


def test_metrics_after_a_resume_have_each_step_once(tmp_path):
    undisturbed = RunFolder.open(Config(), tmp_path / "a")
    weights = train(undisturbed)
    disturbed = RunFolder.open(Config(), tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        train(disturbed, kill_at=4)  # the row of step 3 is written, the checkpoint is that of step 2
    assert [row["step"] for row in read_rows(disturbed)] == [1, 2, 3]
    with disturbed.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')  # a line torn by the kill
    torch.testing.assert_close(train(disturbed), weights, rtol=0, atol=0)
    assert [row["step"] for row in read_rows(disturbed)] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in read_rows(disturbed)] == [row["loss"] for row in read_rows(undisturbed)]
    assert all(row["samples_per_s"] > 0 for row in read_rows(disturbed))


def test_rows_of_a_start_without_checkpoint_are_dropped(tmp_path):
    run = RunFolder.open(Config(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(run, kill_at=2)
    assert [row["step"] for row in read_rows(run)] == [1]
    train(run)
    assert [row["step"] for row in read_rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    run = RunFolder.open(Config(), tmp_path)
    trainer = Trainer(
        model=Line(),
        args=make_training_arguments({"max_steps": 6, "logging_steps": 2, "use_cpu": True}, run.checkpoints, seed=0),
        train_dataset=[{"x": torch.tensor([float("nan"), 1.0])}] * 16,
    )
    report_progress(trainer, run)
    with pytest.raises(InputError, match="The loss is nan at step 2"):
        trainer.train()


def test_incomplete_checkpoints_are_removed(tmp_path, caplog):
    run = RunFolder.open(Config(), tmp_path)
    assert run.find_last_checkpoint() is None
    for step, content in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (11, '{"glob'), (12, None)):
        (run.checkpoints / f"checkpoint-{step}").mkdir()
        if content is not None:
            (run.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (run.checkpoints / "notes").mkdir()
    assert run.find_last_checkpoint() == str(run.checkpoints / "checkpoint-10")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-2", "notes"]
    assert "checkpoint-11" in caplog.text and "checkpoint-12" in caplog.text


def test_record_holds_the_outcome(tmp_path):
    run = RunFolder.open(Config(), tmp_path)
    with pytest.raises(ZeroDivisionError), run.recording():
        run.update_record(parameters=3)
        assert run.record["outcome"] == "running" and not run.is_complete
        _ = 1 / 0
    assert run.record["outcome"].startswith("failed: ZeroDivisionError")
    with pytest.raises(KeyboardInterrupt), run.recording():
        raise KeyboardInterrupt
    assert run.record["outcome"] == "interrupted"
    with run.recording():
        pass
    assert run.is_complete
    record = run.record
    assert record["parameters"] == 3 and len(record["starts"]) == 3
    assert record["versions"]["torch"] == version("torch")
    assert record["peak_memory_gib"] > 0 and record["command"]


def test_an_input_error_of_a_worker_is_one_sentence_again(tmp_path):
    class Failing(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise InputError("This file is bad; remove it.")

    run = RunFolder.open(Config(), tmp_path)
    with pytest.raises(InputError) as caught, run.recording():
        next(iter(torch.utils.data.DataLoader(Failing(), num_workers=1)))
    assert str(caught.value) == "This file is bad; remove it."
    assert run.record["outcome"] == "failed: This file is bad; remove it."


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    (tmp_path / ".model.left").mkdir()  # by an earlier kill
    with pytest.raises(ValueError), write_directory_atomically(target) as directory:
        (directory / "half").write_text("")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    for content in ("old", "new"):
        with write_directory_atomically(target) as directory:
            (directory / "file").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == "new"


def test_arguments_take_any_field_and_have_our_defaults(tmp_path):
    arguments = make_training_arguments({"max_steps": 5, "warmup_steps": 0.1, "optim": "sgd"}, tmp_path, seed=7)
    assert (arguments.max_steps, arguments.warmup_steps, arguments.optim, arguments.seed) == (5, 0.1, "sgd", 7)
    assert arguments.remove_unused_columns is False and arguments.report_to == []
    assert arguments.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"max_steps": 1, "learning_rat": 1.0}, "Did you mean 'learning_rate'"),
        ({"max_steps": "ten"}, r"train\.max_steps='ten' has the wrong type; give a value of type int"),
        ({"max_steps": True}, "wrong type"),
        ({"max_steps": 1, "learning_rate": "1e"}, "give a value of type float"),
        ({"max_steps": 1, "output_dir": "x"}, "set output_dir at the top level"),
        ({"max_steps": 1, "save_only_model": True}, "could not resume"),
        ({"max_steps": 1, "lr_scheduler_type": "cosinus"}, "refused by transformers"),
        ({}, "does not say how long"),
    ],
)
def test_unusable_arguments_get_one_sentence(tmp_path, train, message):
    with pytest.raises(InputError, match=message):
        make_training_arguments(train, tmp_path, seed=0)


def test_missing_deepspeed_names_the_extra_that_brings_it(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    with pytest.raises(InputError, match=r"sf_mllm\[train\]"):
        make_training_arguments({"max_steps": 1, "deepspeed": "zero2.json"}, tmp_path, seed=0)
