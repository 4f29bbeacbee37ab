"""What all measurements share: device, images, how often; and what becomes of a model that cannot be measured."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sf_mllm.bench.correctness import WrongResultError
from sf_mllm.bench.images import Images
from sf_mllm.bench.rows import OUT_OF_MEMORY, Row
from sf_mllm.bench.timing import Spread, Work, free_memory, is_out_of_memory, time_in_turns, wait
from sf_mllm.errors import InputError, first_line

logger = logging.getLogger(__name__)


class DeviceLostError(RuntimeError):
    """The device takes no more work from this process, as CUDA does after an assertion in a kernel.

    Args:
        row: of what failed.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(row.outcome)
        self.row = row


@dataclass(frozen=True)
class Conditions:
    """Where and how to measure."""

    device: torch.device
    images: Images
    repeats: int  # rounds
    seconds: float  # for each model and step, after which no new round begins; at least five are made

    @property
    def warmup(self) -> int:
        """Calls before those that count: a GPU needs a few until its clock and its libraries have settled."""
        return 10 if self.device.type == "cuda" else 2

    def time_in_turns(self, works: Mapping[str, Work]) -> dict[str, Spread]:
        """Time works that have been called often enough before."""
        return time_in_turns(works, self.device, repeats=self.repeats, seconds=self.seconds)

    def note_failure(self, row: Row, error: Exception) -> None:
        """Make a row of what could not be measured; other models go on.

        What is neither out of memory, wrong nor bad input is a defect somewhere and shows its traceback.

        Raises:
            DeviceLostError: none can go on.
        """
        if is_out_of_memory(error):
            row.outcome = OUT_OF_MEMORY
        elif isinstance(error, WrongResultError | InputError):
            row.outcome = str(error)
        else:
            logger.error("%s could not be measured.", row.model, exc_info=error)
            row.outcome = f"failed: {type(error).__name__}: {first_line(error)}"
        error.__traceback__ = None  # its frames hold tensors
        try:
            wait(self.device)
            free_memory(self.device)
        except RuntimeError as lost:
            raise DeviceLostError(row) from lost


def refuse_repeated(names: list[str], what: str) -> None:
    """Raise if a name is given twice: what is called in turns goes by its name.

    Raises:
        InputError: one is.
    """
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{what} '{repeated[0]}' is given twice; give each once.")
