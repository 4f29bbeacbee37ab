"""What the training scripts of the demo share: how long to train, and where nothing may be overwritten."""

import math
import time
from pathlib import Path

from sf_mllm.errors import InputError


class Budget:
    """A number of steps or of seconds, and the learning rate that goes with it: linear warm-up, cosine to zero.

    Args:
        steps: to take, or None.
        seconds: to train where no steps are given.
        warm_up_share: of the budget.
    """

    def __init__(self, steps: int | None, seconds: float | None, *, warm_up_share: float = 0.03) -> None:
        self.steps = steps
        self.seconds = seconds
        self.warm_up_share = warm_up_share
        self._began: float | None = None

    def spent(self, step: int) -> float:
        """Share of the budget that is used up; the clock starts at the first question."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        if self._began is None:
            self._began = time.monotonic()
        return (time.monotonic() - self._began) / self.seconds

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds that no training took place in, such as those of an evaluation."""
        if self._began is not None:
            self._began += seconds

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak rate."""
        spent = min(self.spent(step), 1.0)
        if spent < self.warm_up_share:
            return max(spent / self.warm_up_share, 1e-3)
        return 0.5 * (1 + math.cos(math.pi * (spent - self.warm_up_share) / (1 - self.warm_up_share)))


def refuse_used_directory(path: Path) -> None:
    """Raise an `InputError` unless nothing is there yet, or an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"'{path}' exists and is not an empty directory; give another one or delete it.")
