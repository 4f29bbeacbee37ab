import json

import pytest
import torch

from sf_mllm.training import step_times
from sf_mllm.training.bootstrap.__main__ import main
from sf_mllm.training.step_times import STEP_PHASES, StepTimes, describe_speed

LAPS = [("other", 0.25), ("data", 1.0), ("student", 2.0), ("teacher", 3.0), ("losses", 0.5), ("backward", 1.25)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; returns the function that moves it."""
    now = [100.0]
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def take_step(times, move, slowness):
    for phase, seconds in LAPS:
        move(seconds * slowness)
        times.lap(phase)
    move(2.0 * slowness)
    times.on_optimizer_step(None, None, None)


def test_an_interval_holds_means_over_its_steps(clock):
    times = StepTimes(torch.device("cpu"), images_per_step=6)
    times.on_train_begin(None, None, None)
    take_step(times, clock, 1.0)
    take_step(times, clock, 3.0)
    assert times.end_interval() == {
        "time_step_ms": 20000.0,
        "time_data_ms": 2000.0,
        "time_student_ms": 4000.0,
        "time_teacher_ms": 6000.0,
        "time_losses_ms": 1000.0,
        "time_backward_ms": 2500.0,
        "time_optimizer_ms": 4000.0,
        "time_other_ms": 500.0,
        "time_data_share": 0.1,
    }
    assert times.end_interval() == {}


def test_the_summary_leaves_out_the_first_interval_and_what_is_no_step(clock):
    times = StepTimes(torch.device("cpu"), images_per_step=6)
    times.on_train_begin(None, None, None)
    take_step(times, clock, 100.0)  # compiles
    times.end_interval()
    clock(7.0)
    times.on_evaluate(None, None, None)
    clock(3.0)
    times.on_save(None, None, None)
    for _ in range(3):
        take_step(times, clock, 1.0)
    summary = times.summary()
    assert summary["images_per_s"] == 0.6 and summary["step_ms"] == 10000.0 and summary["steps_measured"] == 3
    assert summary["shares"] == {
        "data": 0.1, "student": 0.2, "teacher": 0.3, "losses": 0.05, "backward": 0.125, "optimizer": 0.2,
        "other": 0.025,
    }  # fmt: skip
    assert (summary["evaluation_s"], summary["checkpoint_s"]) == (7.0, 3.0)
    assert times.summary() == summary
    line = describe_speed(summary)
    assert line.startswith("0.6 images/s, 1e+04 ms a step: teacher 30 %, student 20 %, optimizer 20 %")
    assert line.endswith("besides, evaluation 7 s, checkpoints 3 s.")


def test_a_run_that_takes_no_step_has_no_speed():
    times = StepTimes(torch.device("cpu"), images_per_step=6)
    times.on_evaluate(None, None, None)  # an evaluation without a training
    times.on_train_begin(None, None, None)
    assert times.summary() == {}


def test_a_run_says_where_its_time_went(run_file, caplog):
    accumulated = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    assert main([str(run_file), "train.max_steps=6", *accumulated]) == 0
    folder = run_file.parent / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "loss" in row):
        parts = [row[f"time_{phase}_ms"] for phase in STEP_PHASES]
        assert sum(parts) == pytest.approx(row["time_step_ms"], abs=0.01)
        assert min(row[f"time_{phase}_ms"] for phase in ("data", "student", "teacher", "losses", "backward")) > 0
        assert row["time_data_share"] == pytest.approx(row["time_data_ms"] / row["time_step_ms"], abs=1e-3)
        # The clock of the whole interval knows of evaluations too, so its steps seem to take at least as long.
        assert row["time_step_ms"] <= 1e3 * 4 / row["samples_per_s"] * 1.01
    speed = json.loads((folder / "run.json").read_text())["speed"]
    assert speed["steps_measured"] == 4
    assert speed["images_per_s"] == pytest.approx(4e3 / speed["step_ms"], rel=1e-3)
    assert describe_speed(speed) in caplog.text
    assert "time_" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_phase_is_the_work_of_the_device():
    times = StepTimes(torch.device("cuda"), images_per_step=1)
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    times.on_train_begin(None, None, None)
    for _ in range(3):
        matrix @ matrix
    times.lap("teacher")  # returns long before the products are done
    times.lap("student")
    times.on_optimizer_step(None, None, None)
    row = times.end_interval()
    assert row["time_teacher_ms"] > 20 * row["time_student_ms"]
