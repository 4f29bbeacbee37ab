"""Where the time of a training run goes, without stopping the device to find out."""

import time
from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STEP_PHASES = ("data", "student", "teacher", "losses", "backward", "optimizer", "other")
"""What an optimizer step is made of; "other" is bookkeeping between steps."""

_Mark = torch.cuda.Event | float


class StepTimes(TrainerCallback):
    """A stopwatch for the phases of a training run: each `lap` ends one and begins the next.

    On CUDA a lap is an event in the stream of work, read when the Trainer waits for the device anyway: a phase is the
    time that the device spent on it, and "data" the time for which it stood still for the next batch. On other devices
    a lap is a look at the host's clock. Of several processes each measures itself, and the first one reports.

    Args:
        device: does the work.
        images_per_step: in one optimizer step, over all processes.
    """

    def __init__(self, device: torch.device, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._uses_events = device.type == "cuda"
        self._began: _Mark | None = None
        self._laps: list[tuple[str, _Mark]] = []
        self._num_steps = 0
        self._intervals: list[tuple[int, dict[str, float]]] = []
        self._outside_steps = {"evaluation": 0.0, "checkpoint": 0.0}

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`: one of `STEP_PHASES`, "evaluation" or "checkpoint"."""
        self._laps.append((phase, self._mark()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the watch."""
        self._began = self._mark()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End "optimizer", which holds the clipping of gradients too. DeepSpeed does both within "backward"."""
        self.lap("optimizer")
        self._num_steps += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End "evaluation"."""
        if self._began is not None:
            self.lap("evaluation")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End "checkpoint"."""
        self.lap("checkpoint")

    def end_interval(self) -> dict[str, float]:
        """Close a logging interval; call it where the device has just been waited for.

        Returns:
            `time_step_ms` and `time_<phase>_ms`, means over the optimizer steps of the interval, and `time_data_share`
            of the step; empty without a step.
        """
        seconds = self._read_laps()
        for phase in self._outside_steps:
            self._outside_steps[phase] += seconds[phase]
        if not self._num_steps:
            return {}
        self._intervals.append((self._num_steps, {phase: seconds[phase] for phase in STEP_PHASES}))
        milliseconds = {phase: 1e3 * seconds[phase] / self._num_steps for phase in STEP_PHASES}
        self._num_steps = 0
        total = sum(milliseconds.values())
        row = {"step": total, **milliseconds}
        return {f"time_{name}_ms": round(value, 3) for name, value in row.items()} | {
            "time_data_share": round(milliseconds["data"] / max(total, 1e-9), 4)
        }

    def summary(self) -> dict[str, Any]:
        """Return images/s, the time of a step and the share of each phase in it, and seconds spent outside of steps.

        The first interval, in which a model is compiled and a loader started, counts only where there is no other.
        Empty before the first step.
        """
        self.end_interval()  # what came after the last logged step
        if not self._intervals:
            return {}
        steady = self._intervals[1:] or self._intervals
        num_steps = sum(steps for steps, _ in steady)
        seconds = {phase: sum(times[phase] for _, times in steady) for phase in STEP_PHASES}
        in_steps = max(sum(seconds.values()), 1e-9)
        return {
            "images_per_s": round(num_steps * self.images_per_step / in_steps, 2),
            "step_ms": round(1e3 * in_steps / num_steps, 3),
            "steps_measured": num_steps,
            "shares": {phase: round(value / in_steps, 4) for phase, value in seconds.items()},
            **{f"{phase}_s": round(value, 1) for phase, value in self._outside_steps.items()},
        }

    def _mark(self) -> _Mark:
        if not self._uses_events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_laps(self) -> dict[str, float]:
        """Sum the seconds of each phase and forget the laps."""
        seconds: dict[str, float] = defaultdict(float)
        if not self._laps:
            return seconds
        assert self._began is not None, "a lap before the training began"
        previous = self._began
        if isinstance(last := self._laps[-1][1], torch.cuda.Event):
            last.synchronize()
        for phase, mark in self._laps:
            seconds[phase] += _seconds_between(previous, mark)
            previous = mark
        self._began, self._laps = previous, []
        return seconds


def describe_speed(summary: dict[str, Any]) -> str:
    """Put `StepTimes.summary` into one line."""
    shares = sorted(summary["shares"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{phase} {100 * share:.0f} %" for phase, share in shares if share >= 0.005)
    return (
        f"{summary['images_per_s']:.4g} images/s, {summary['step_ms']:.4g} ms a step: {parts}; besides, evaluation "
        f"{summary['evaluation_s']:.3g} s, checkpoints {summary['checkpoint_s']:.3g} s."
    )


def _seconds_between(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1e3
