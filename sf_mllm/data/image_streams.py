"""A whole run's training samples in order, from tar shards that are read from front to back."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sf_mllm.data.augment import Resolution, Views, resolution_of_step
from sf_mllm.data.image_sources import RawImage
from sf_mllm.data.images import order_of_epoch
from sf_mllm.data.shared_log import SharedLog, UnreadableImages
from sf_mllm.data.tar_shards import TarShards
from sf_mllm.errors import InputError

_FIRST_IMAGES = 1000
"""The share of unreadable images is taken of at least so many: one bad image among the first ten says little.
So many in a row are never right."""

_TimedImage = tuple[int, RawImage]
"""Epoch and image."""


class ShardSizes:
    """Number of images of each shard that has been read to its end, so that it need not be read to be skipped.

    Args:
        log: shared by all readers of a run.
    """

    def __init__(self, log: SharedLog) -> None:
        self._log = log
        self._sizes: dict[str, int] = {}

    def refresh(self) -> dict[str, int]:
        """Return all sizes that are known, by the shard's group."""
        self._sizes.update((row["shard"], row["images"]) for row in self._log.read_new())
        return self._sizes

    def note(self, shard: str, num_images: int) -> None:
        """Remember a size.

        Raises:
            InputError: the shard had another size before.
        """
        known = self._sizes.get(shard) or self.refresh().get(shard)
        if known is None:
            self._log.append({"shard": shard, "images": num_images})
        elif known != num_images:
            raise InputError(
                f"{shard} holds {num_images} images now and {known} when this run read it first; restore it or start a "
                "new run in another output_dir."
            )


class StreamedImages(Dataset[dict[str, Tensor]]):
    """A whole run's crops in order, addressed by position although the shards are read sequentially.

    The shards of epoch 0, of epoch 1 and so on, each epoch in an order of its own, form one endless row. It is dealt to
    `num_lanes` lanes, which read their shards one after the other through a shuffling buffer. A run's positions are
    dealt to the lanes in blocks, which are micro-batches. So what a position yields depends on the seed, the position
    and the number of lanes: a resume repeats and loses no image, whatever the number of workers and processes then.

    A data loader's worker asks for growing positions; if there are as many lanes as workers over all processes, each of
    them has a lane of its own and reads nothing twice. A resumed run skips the shards whose size it noted before as a
    whole; of the one under way it reads the images before its position without decoding them.

    In place of an image that cannot be decoded comes the next one of the lane.

    Args:
        shards: where the images come from.
        numbers: the shards to train on.
        num_lanes: readers among whom shards and positions are dealt.
        block: positions in a row that a lane fills.
        num_samples: crops in the whole run.
        step_size: crops of an optimizer step, over all processes.
        views: how an image becomes a sample.
        resolutions: of the crops; each step has one of them.
        seed: of all orders.
        shuffle_buffer: undecoded images that a lane holds to shuffle them.
        unreadable: counts what cannot be decoded; the share is that of the images read so far.
        sizes: of the shards that are known.
    """

    def __init__(
        self,
        shards: TarShards,
        numbers: Sequence[int],
        *,
        num_lanes: int,
        block: int,
        num_samples: int,
        step_size: int,
        views: Views,
        resolutions: Sequence[Resolution],
        seed: int,
        shuffle_buffer: int,
        unreadable: UnreadableImages,
        sizes: ShardSizes,
    ) -> None:
        self.shards, self.numbers, self.num_lanes, self.block = shards, numbers, num_lanes, block
        self.num_samples, self.step_size = num_samples, step_size
        self.views, self.resolutions, self.seed, self.unreadable = views, resolutions, seed, unreadable
        self.shuffle_buffer, self.sizes = shuffle_buffer, sizes
        self._lanes: dict[int, _Lane] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __str__(self) -> str:
        return f"from {len(self.numbers)} tar shards"

    def epochs_after(self, num_samples: int) -> float:
        """How often a run has seen each image after a number of samples.

        Estimated by the shards read so far; 0 as long as none was read to its end.
        """
        sizes = self.sizes.refresh()
        return num_samples * len(sizes) / (sum(sizes.values()) * len(self.numbers)) if sizes else 0.0

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Return the sample of a position, at least {"pixel_values": [3, H, W], uint8}."""
        block, offset = divmod(position, self.block)
        turn, lane = divmod(block, self.num_lanes)
        resolution = resolution_of_step(self.resolutions, self.seed, position // self.step_size)
        for epoch, raw in itertools.islice(self._read(lane, turn * self.block + offset), _FIRST_IMAGES):
            try:
                image = raw.open()
            except InputError as error:
                self._note_unreadable(raw, error, position)
            else:
                return self.views.cut(image, raw.key, epoch, resolution)
        raise InputError(f"{_FIRST_IMAGES} images in a row cannot be read; check the shards of data.images.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lanes": {}}  # open files stay here when a worker gets a copy

    def _read(self, lane: int, position: int) -> Iterator[_TimedImage]:
        """Yield what a lane holds at a position and after it."""
        reader = self._lanes.get(lane)
        if reader is None or position < reader.position:
            reader = self._lanes[lane] = _Lane(self._samples_of(lane, position), position)
        return reader.look_ahead(position)

    def _samples_of(self, lane: int, skipped: int) -> Iterator[_TimedImage]:
        """Yield the images of a lane, shard after shard, without the first ones."""
        sizes = self.sizes.refresh() if skipped else {}
        for turn in itertools.count(lane, self.num_lanes):
            epoch, place = divmod(turn, len(self.numbers))
            number = self.numbers[int(order_of_epoch(self.seed, epoch, len(self.numbers))[place])]
            shard = self.shards.group(number)
            if skipped >= sizes.get(shard, skipped + 1):
                skipped -= sizes[shard]
                continue
            num_images = 0
            for raw in self.shards.read_shuffled(number, self.shuffle_buffer, f"{self.seed} {epoch} {shard}"):
                num_images += 1
                if skipped:
                    skipped -= 1
                else:
                    yield epoch, raw
            self.sizes.note(shard, num_images)

    def _note_unreadable(self, raw: RawImage, error: InputError, position: int) -> None:
        num_read = position + 1
        sizes = self.sizes.refresh()
        if len(sizes) >= len(self.numbers):
            num_read = min(num_read, sum(sizes.values()))
        allowed = int(self.unreadable.max_share * max(num_read, _FIRST_IMAGES))
        self.unreadable.note(raw.name, error, num_read, allowed)


class _Lane:
    """An iterator that can be read at growing positions and looked ahead of.

    Args:
        samples: from `position` on.
        position: of the next sample.
    """

    def __init__(self, samples: Iterator[_TimedImage], position: int) -> None:
        self.position = position
        self._samples = samples
        self._ahead: deque[_TimedImage] = deque()

    def look_ahead(self, position: int) -> Iterator[_TimedImage]:
        """Drop what lies before a position; yield the rest, which stays to be read."""
        while self.position < position:
            self._take(0)
            self._ahead.popleft()
            self.position += 1
        for offset in itertools.count():
            yield self._take(offset)

    def _take(self, offset: int) -> _TimedImage:
        if offset == len(self._ahead):
            self._ahead.append(next(self._samples))
        return self._ahead[offset]
