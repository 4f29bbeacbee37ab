"""What a run reports while it trains: rows in `metrics.jsonl` and a line that a person can read."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from sf_mllm.config import write_text_atomically
from sf_mllm.errors import InputError
from sf_mllm.training.run_folder import RunFolder, is_main_process

logger = logging.getLogger(__name__)

_NOT_ON_THE_LINE = {"epoch", "total_flos", "step", "learning_rate", "grad_norm", "samples_per_s"}


Describe = Callable[[Mapping[str, Any]], str | None]
"""Puts a row with many numbers into one line; None leaves it to the reporter."""


def describe_nothing(row: Mapping[str, Any]) -> None:
    """Leave every row to the reporter."""


def report_progress(trainer: Trainer, run: RunFolder, describe: Describe = describe_nothing) -> None:
    """Let a Trainer write `metrics.jsonl` and log readable lines instead of printing dictionaries.

    Args:
        trainer: to report on.
        run: where the rows go.
        describe: for rows that a run wants to word itself.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReporter(run.metrics_file, describe))


def configure_logging() -> None:
    """Show this package's log lines on stderr, without bars between them; for entry points only.

    Of several processes only the main one tells more than warnings.
    """
    disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sf_mllm").setLevel(logging.INFO if is_main_process() else logging.WARNING)


def explain_not_finite(loss: float, step: int, since: str = "") -> InputError:
    """Return what to raise when a loss is no number.

    Args:
        loss: as it is logged.
        step: that it is logged at.
        since: where it began, if that is known.
    """
    return InputError(
        f"The loss is {loss} at step {step}{since}; start a new run with a lower train.learning_rate, or with "
        "train.bf16 in place of train.fp16."
    )


class ProgressReporter(TrainerCallback):
    """Appends one row for each log event; after a resume, rows beyond the resumed step are dropped first."""

    def __init__(self, metrics_file: Path, describe: Describe = describe_nothing) -> None:
        self.metrics_file = metrics_file
        self.describe = describe
        self._began = self._last_time = self._trained_until = 0.0
        self._first_step = self._last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this start begins and drop rows that will be made again."""
        self._began = self._last_time = self._trained_until = time.monotonic()
        self._first_step = self._last_step = state.global_step
        if not state.is_world_process_zero:
            return
        _truncate_rows(self.metrics_file, last_step=state.global_step)
        if state.global_step:
            logger.info("Resuming at step %d of %d.", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when training paused: an evaluation that comes now is no part of the training's speed."""
        self._trained_until = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a row and log a line.

        Raises:
            InputError: the loss is not finite; going on would waste the rest of the run.
        """
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise explain_not_finite(logs["loss"], state.global_step)
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:  # the summary goes into run.json
            return
        row: dict[str, Any] = {"step": state.global_step, **logs}
        now = time.monotonic()
        if "loss" in logs and state.global_step > self._last_step:
            samples = (state.global_step - self._last_step) * _global_batch_size(args)
            row["samples_per_s"] = round(samples / (now - self._last_time), 2)
            self._last_time, self._last_step = now, state.global_step
        elif "loss" not in logs:
            self._last_time += now - max(self._last_time, self._trained_until)
            if state.global_step == self._first_step:  # before training: the steps to come will not be as slow
                self._began = self._last_time
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s", self._line(row, state, now))

    def _line(self, row: Mapping[str, Any], state: TrainerState, now: float) -> str:
        width = len(str(state.max_steps))
        parts = [f"step {state.global_step:>{width}}/{state.max_steps}"]
        described = self.describe(row)
        if described is not None:
            return "  ".join([*parts, described])
        for key, value in row.items():
            if key not in _NOT_ON_THE_LINE and not key.startswith("time_") and isinstance(value, int | float):
                parts.append(f"{key} {value:.4g}")
        if "samples_per_s" in row:
            seconds_a_step = (now - self._began) / (state.global_step - self._first_step)
            left = (state.max_steps - state.global_step) * seconds_a_step
            parts += [
                f"lr {row.get('learning_rate', 0.0):.1e}",
                f"{row['samples_per_s']:.4g}/s",
                f"left {format_clock(left)}",
            ]
        return "  ".join(parts)


def _truncate_rows(metrics_file: Path, last_step: int) -> None:
    """Keep the rows up to a step; a line torn by a kill is dropped with the rest. Step 0 means a new beginning."""
    if not metrics_file.exists():
        return
    kept = []
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            is_kept = 0 < last_step and json.loads(line)["step"] <= last_step
        except ValueError:
            is_kept = False
        if is_kept:
            kept.append(line + "\n")
    write_text_atomically(metrics_file, "".join(kept))


def _global_batch_size(args: TrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def format_clock(seconds: float) -> str:
    """Write a duration as minutes:seconds or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
