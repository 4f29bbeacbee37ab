"""Every image of a run once, group by group, with its crops: what a teacher store is made of."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sf_mllm.data.augment import Crop, CropSettings, ImageKey, Resolution, crop_generator, cut, draw_crop
from sf_mllm.data.image_sources import IMAGES_A_GROUP, ImageSource, key_of
from sf_mllm.data.images import HELD_OUT
from sf_mllm.data.tar_shards import TarShards
from sf_mllm.errors import InputError

logger = logging.getLogger(__name__)

_IMAGES_A_CHUNK = 8
"""Few enough that the batches made of chunks need not wait long, enough that passing them on costs little."""


class GroupedImage(NamedTuple):
    """An image that is not decoded yet."""

    key: ImageKey
    open: Callable[[], Image.Image]


class ImageGroups(Protocol):
    """Images in groups that a store keeps in a file each."""

    names: list[str]

    @property
    def num_images(self) -> int | None:
        """Images of all groups; None if they must be read to be counted."""

    def read(self, name: str) -> Iterator[GroupedImage]:
        """Yield the images of a group."""


class NumberedGroups:
    """Images of a source in groups of neighbours.

    Args:
        source: of the images.
        indices: of those that are wanted, sorted.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.num_images = len(indices)
        groups, starts = np.unique(indices // IMAGES_A_GROUP, return_index=True)
        self.names = [key_of(group * IMAGES_A_GROUP).group for group in groups.tolist()]
        self._parts = dict(zip(self.names, np.split(indices, starts[1:]), strict=True))

    def read(self, name: str) -> Iterator[GroupedImage]:
        """Yield the images of a group."""
        for index in self._parts[name].tolist():
            yield GroupedImage(key_of(index), partial(self.source.open, index))


class HeldOutGroup:
    """Held-out images, one group.

    Args:
        source: of the images.
        indices: of the held-out ones, in the order of the data set.
    """

    names = [HELD_OUT]

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.num_images = len(indices)

    def read(self, name: str) -> Iterator[GroupedImage]:
        """Yield the images."""
        for number, index in enumerate(self.indices.tolist()):
            yield GroupedImage(ImageKey(name, number), partial(self.source.open, index))


class ShardGroups:
    """Images of tar shards, each of which is a group.

    Args:
        shards: of the images.
        numbers: of those that are wanted.
    """

    num_images = None

    def __init__(self, shards: TarShards, numbers: Sequence[int]) -> None:
        self.shards = shards
        self._numbers = {shards.group(number): number for number in numbers}
        self.names = list(self._numbers)

    def read(self, name: str) -> Iterator[GroupedImage]:
        """Yield the images of a shard."""
        for raw in self.shards.read(self._numbers[name]):
            yield GroupedImage(raw.key, raw.open)


class RandomCrops:
    """The crops that the first epochs of a run without a store take of an image.

    Args:
        settings: ranges of the crops; they have one resolution.
        seed: of the run.
        count: crops of each image.
    """

    def __init__(self, settings: CropSettings, seed: int, count: int) -> None:
        self.settings, self.seed, self.count = settings, seed, count

    def __call__(self, size: tuple[int, int], key: ImageKey) -> list[Crop]:
        """Draw the crops of an image of (width, height)."""
        height, width = self.settings.resolutions[0]
        generators = [crop_generator(self.seed, epoch, key) for epoch in range(self.count)]
        return [draw_crop(size, self.settings, rng, aspect_ratio=width / height) for rng in generators]


class WholeImage:
    """One crop, the whole image."""

    count = 1

    def __call__(self, size: tuple[int, int], key: ImageKey) -> list[Crop]:
        """Return it for an image of (width, height)."""
        return [Crop(0, 0, size[1], size[0], flip=False, jitter=None)]


@dataclass
class Chunk:
    """K crops of each of some images of one group."""

    group: str
    keys: list[ImageKey] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of each image."""
    crops: list[list[Crop]] = field(default_factory=list)
    pixel_values: list[Tensor] = field(default_factory=list)
    """[K, 3, H, W], uint8, of each image."""
    num_unreadable: int = 0
    is_last: bool = False
    """Nothing of the group follows from the same worker."""


class GroupCrops(IterableDataset[Chunk]):
    """Crops of groups, one group after the other; the workers of a data loader share out the images of each.

    An image that cannot be decoded is logged by name and left out.

    Args:
        groups: where the images are.
        names: of the groups that are wanted.
        crops: what is cut out of an image.
        resolution: of the crops.
        color_jitter: see `CropSettings`.
    """

    def __init__(
        self,
        groups: ImageGroups,
        names: Sequence[str],
        *,
        crops: RandomCrops | WholeImage,
        resolution: Resolution,
        color_jitter: float,
    ) -> None:
        self.groups, self.names, self.crops = groups, names, crops
        self.resolution, self.color_jitter = resolution, color_jitter

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks of this worker; of each group at least one, the last."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for name in self.names:
            chunk = Chunk(name)
            for image in itertools.islice(self.groups.read(name), first, None, step):
                if len(chunk.keys) == _IMAGES_A_CHUNK:
                    yield chunk
                    chunk = Chunk(name)
                self._add(chunk, image)
            chunk.is_last = True
            yield chunk

    def _add(self, chunk: Chunk, image: GroupedImage) -> None:
        try:
            decoded = image.open()
        except InputError as error:
            logger.warning("Left out an image that cannot be read: %s", error)
            chunk.num_unreadable += 1
            return
        crops = self.crops(decoded.size, image.key)
        chunk.keys.append(image.key)
        chunk.sizes.append(decoded.size)
        chunk.crops.append(crops)
        chunk.pixel_values.append(
            torch.stack([cut(decoded, crop, self.resolution, self.color_jitter) for crop in crops])
        )
