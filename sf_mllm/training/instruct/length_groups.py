"""An order of rows in which those of one batch are of similar length, so that little is padded."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

_BATCHES_SORTED_TOGETHER = 50


class LengthGroupedSampler(Sampler[int]):
    """Gives all rows in random order, but rows of similar length in one batch.

    Rows are shuffled; each stretch of 50 batches is sorted by length and cut into batches; all batches are shuffled.
    The one with the longest row comes first: if it does not fit the device's memory, that shows at once. What is too
    little for a batch comes last.

    transformers' own sampler for this draws from the process's generator, on which processes need not agree after a
    while, nor a run with its resumption; and it leaves batches in falling order, so that losses form a saw-tooth.

    Args:
        lengths: of each row.
        batch_size: rows of one optimizer step, over all processes, so that the order does not depend on their number.
        seed: of the run.
        epoch: tells the present epoch; each has an order of its own.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        rows = torch.randperm(len(self), generator=generator)
        rows, rest = rows.tensor_split([len(self) - len(self) % self.batch_size])
        if len(rows):
            stretches = rows.split(_BATCHES_SORTED_TOGETHER * self.batch_size)
            rows = torch.cat([stretch[self.lengths[stretch].argsort()] for stretch in stretches])
            batches = rows.view(-1, self.batch_size)
            batches = batches[torch.randperm(len(batches), generator=generator)]
            longest = int(self.lengths[batches].amax(dim=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
            rows = batches.flatten()
        return iter([*rows.tolist(), *rest.tolist()])
