"""A whole run's training samples in order, and its held-out samples, from images that can be read at any time."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sf_mllm.data.augment import ImageKey, Resolution, Views, resolution_of_step
from sf_mllm.data.image_sources import ImageSource, key_of
from sf_mllm.data.shared_log import UnreadableImages
from sf_mllm.errors import InputError

HELD_OUT = "held-out"
"""Group in the keys of held-out images; their row is their number."""


def hold_out(num_images: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the numbers of images at random into (training, held-out), each sorted.

    Raises:
        InputError: nothing would be left to train on.
    """
    if count >= num_images:
        raise InputError(
            f"There are {num_images} images and data.held_out={count}; give more images or hold out fewer."
        )
    is_held_out = np.zeros(num_images, dtype=bool)
    is_held_out[np.random.default_rng(seed).permutation(num_images)[:count]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


class TrainingImages(Dataset[dict[str, Tensor]]):
    """A whole run's crops in order: epoch after epoch, each in an order of its own.

    What a position yields depends on the seed and the position only, so neither the number of workers nor a resume
    changes what a model sees. In place of an image that cannot be decoded comes another one, which the seed draws.

    Args:
        source: where the images come from.
        indices: those to train on.
        num_samples: crops in the whole run.
        step_size: crops of an optimizer step, over all processes.
        views: how an image becomes a sample.
        resolutions: of the crops; each step has one of them.
        seed: of order and replacements.
        unreadable: counts what cannot be decoded.
        num_images: training and held-out images together, for the share that may be unreadable.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        *,
        num_samples: int,
        step_size: int,
        views: Views,
        resolutions: Sequence[Resolution],
        seed: int,
        unreadable: UnreadableImages,
        num_images: int,
    ) -> None:
        self.source, self.indices = source, indices
        self.num_samples, self.step_size = num_samples, step_size
        self.views, self.resolutions, self.seed = views, resolutions, seed
        self.unreadable, self.num_images = unreadable, num_images

    def __len__(self) -> int:
        return self.num_samples

    def __str__(self) -> str:
        return f"{self.num_samples / len(self.indices):.4g} epochs of {len(self.indices)} images"

    def epochs_after(self, num_samples: int) -> float:
        """How often a run has seen each image after a number of samples."""
        return num_samples / len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Return the sample of a position, at least {"pixel_values": [3, H, W], uint8}."""
        epoch, offset = divmod(position, len(self.indices))
        first = int(order_of_epoch(self.seed, epoch, len(self.indices))[offset])
        image, number = _open_readable(
            self.source, self.indices, first, (self.seed, epoch, first), self.unreadable, self.num_images
        )
        resolution = resolution_of_step(self.resolutions, self.seed, position // self.step_size)
        return self.views.cut(image, key_of(int(self.indices[number])), epoch, resolution)


class HeldOutImages(Dataset[dict[str, Tensor]]):
    """Whole images, squeezed as the saved image processor does it.

    Args:
        source: where the images come from.
        indices: the held-out ones.
        views: how an image becomes a sample.
        resolution: of the samples.
        unreadable: counts what cannot be decoded.
        num_images: training and held-out images together, for the share that may be unreadable.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        *,
        views: Views,
        resolution: Resolution,
        unreadable: UnreadableImages,
        num_images: int,
    ) -> None:
        self.source, self.indices, self.views, self.resolution = source, indices, views, resolution
        self.unreadable, self.num_images = unreadable, num_images

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return a sample, at least {"pixel_values": [3, H, W], uint8}."""
        image, number = _open_readable(self.source, self.indices, number, (number,), self.unreadable, self.num_images)
        return self.views.whole(image, ImageKey(HELD_OUT, number), self.resolution)


@lru_cache(maxsize=2)
def order_of_epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order in which an epoch takes images or shards."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def _open_readable(
    source: ImageSource,
    indices: np.ndarray,
    number: int,
    entropy: tuple[int, ...],
    unreadable: UnreadableImages,
    num_images: int,
) -> tuple[Image.Image, int]:
    """Decode the image of a place in `indices`, or of the first readable place drawn instead; return it and the place.

    Raises:
        InputError: too many images have failed.
    """
    rng = np.random.default_rng(entropy)
    while True:
        index = int(indices[number])
        try:
            return source.open(index), number
        except InputError as error:
            unreadable.note(source.name(index), error, num_images)
            number = int(rng.integers(len(indices)))
