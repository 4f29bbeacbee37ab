"""Unlabelled images of the bootstrap stage: files of a folder, cut and mirrored reproducibly."""

import hashlib
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from sf_mllm.data.image_io import open_image
from sf_mllm.errors import InputError

logger = logging.getLogger(__name__)

BICUBIC = v2.InterpolationMode.BICUBIC  # what CLIP models were trained with
IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def find_images(folder: str | Path) -> list[Path]:
    """List the image files of a folder and its subfolders, sorted, so that every run sees the same order.

    Raises:
        InputError: there is no such folder or it holds no image file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"Image folder '{folder}' does not exist; set data.images to a folder of images or 'scenes'.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"Image folder '{folder}' holds no image file ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return paths


def hold_out(paths: list[Path], count: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Split files at random into (training, held-out).

    Raises:
        InputError: nothing would be left to train on.
    """
    if count >= len(paths):
        raise InputError(
            f"There are {len(paths)} images and data.held_out={count}; give more images or hold out fewer."
        )
    is_held_out = np.zeros(len(paths), dtype=bool)
    is_held_out[np.random.default_rng(seed).permutation(len(paths))[:count]] = True
    training = [path for path, held in zip(paths, is_held_out, strict=True) if not held]
    return training, [path for path, held in zip(paths, is_held_out, strict=True) if held]


def digest_names(paths: list[Path], folder: str | Path) -> str:
    """SHA-256 of the files' names relative to their folder: changes when files come or go."""
    return hashlib.sha256("\n".join(path.relative_to(folder).as_posix() for path in paths).encode()).hexdigest()


class ImageFiles:
    """Decodes files; what cannot be decoded is logged by name, counted, and replaced by another file.

    The count is shared with the workers of a data loader.

    Args:
        paths: the files.
        max_unreadable_share: an `InputError` is raised once more than this share of the files has failed.
    """

    def __init__(self, paths: list[Path], max_unreadable_share: float) -> None:
        self.paths = paths
        self.max_unreadable = int(max_unreadable_share * len(paths))
        self._is_unreadable = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_unreadable(self) -> int:
        """Files that have failed so far."""
        return int(self._is_unreadable.sum())

    def open(self, index: int, rng: np.random.Generator) -> Image.Image:
        """Decode a file, or in its place the first readable one that `rng` draws.

        Raises:
            InputError: too many files have failed.
        """
        while True:
            try:
                return open_image(self.paths[index])
            except InputError as error:
                self._note_unreadable(index, error)
                index = int(rng.integers(len(self.paths)))

    def _note_unreadable(self, index: int, error: InputError) -> None:
        if not self._is_unreadable[index]:
            self._is_unreadable[index] = True
            logger.warning("Replaced an image that cannot be read: %s", error)
        if self.num_unreadable > self.max_unreadable:
            raise InputError(
                f"{self.num_unreadable} of {len(self.paths)} image files cannot be read, {self.max_unreadable} are "
                f"allowed; remove them or raise data.max_unreadable_share (the last one: {error})"
            )


class TrainingImages(Dataset[dict[str, Tensor]]):
    """A whole run's crops in order: epoch after epoch, each in an order of its own.

    What a position yields depends on the seed and the position only, so neither the number of workers nor a resume
    changes what a model sees.

    Args:
        files: where the images come from.
        num_samples: crops in the whole run.
        resolution: side of the crops in pixels.
        min_crop_area: smallest share of an image that a crop takes.
        flip: mirror half of the crops.
        seed: of order and augmentation.
    """

    def __init__(
        self, files: ImageFiles, *, num_samples: int, resolution: int, min_crop_area: float, flip: bool, seed: int
    ) -> None:
        self.files = files
        self.num_samples = num_samples
        self.seed = seed
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(resolution, scale=(min_crop_area, 1.0), interpolation=BICUBIC),
                v2.RandomHorizontalFlip(0.5 if flip else 0.0),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_epochs(self) -> float:
        """How often the run sees each file."""
        return self.num_samples / len(self.files)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Return {"pixel_values": [3, R, R], uint8}."""
        epoch, offset = divmod(position, len(self.files))
        index = int(_order_of_epoch(self.seed, epoch, len(self.files))[offset])
        rng = np.random.default_rng((self.seed, epoch, index))
        image = self.files.open(index, rng)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return {"pixel_values": self.augment(image)}


class HeldOutImages(Dataset[dict[str, Tensor]]):
    """Whole images of files in their order, squeezed into a square as the saved image processor does it.

    Args:
        files: where the images come from.
        resolution: side of the square in pixels.
    """

    def __init__(self, files: ImageFiles, resolution: int) -> None:
        self.files = files
        self.squeeze = v2.Compose([v2.Resize((resolution, resolution), BICUBIC), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return {"pixel_values": [3, R, R], uint8}."""
        return {"pixel_values": self.squeeze(self.files.open(index, np.random.default_rng(index)))}


@lru_cache(maxsize=2)
def _order_of_epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)
