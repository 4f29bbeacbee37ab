"""How a training image is cut: crops are drawn first, as plain numbers that can be stored, and applied afterwards."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

from sf_mllm.errors import InputError

BICUBIC = v2.InterpolationMode.BICUBIC  # what CLIP models were trained with

Resolution = tuple[int, int]
"""(height, width) of a crop in pixels."""


class ImageKey(NamedTuple):
    """Name of an image that does not depend on the order in which a run sees it."""

    group: str
    """A tar shard, or 1024 consecutive images of any other source."""
    row: int
    """Number of the image inside its group."""


class Crop(NamedTuple):
    """What is cut out of an image and how it is changed."""

    top: int
    """Of the box, in pixels of the decoded image, like the next three."""
    left: int
    height: int
    width: int
    flip: bool
    """Mirror it."""
    jitter: int | None
    """Seed of the colour jitter; None without one."""


@dataclass(frozen=True)
class CropSettings:
    """Ranges that crops are drawn from.

    Args:
        min_crop_area: smallest share of an image that a crop takes, above 0 and at most 1.
        max_aspect_ratio: how much wider or higher than an undistorted or a whole, squeezed image a crop may be, at
            least 1.
        flip: mirror half of the crops.
        color_jitter: largest change of brightness, contrast and saturation, as a share, and four times that of the hue,
            as a share of the colour circle; 0 to 1.
        resolutions: sizes of the crops; each batch has one of them.
    """

    min_crop_area: float = 0.4
    max_aspect_ratio: float = 4 / 3
    flip: bool = True
    color_jitter: float = 0.0
    resolutions: tuple[Resolution, ...] = ((224, 224),)


def parse_resolutions(value: object) -> tuple[Resolution, ...]:
    """Read a list of sides or of [height, width] pairs.

    Raises:
        InputError: it is no such list, or a side is below 8 pixels.
    """
    sizes = []
    for size in value if isinstance(value, list | tuple) else []:
        pair = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(pair) != 2 or any(type(side) is not int or side < 8 for side in pair):
            break
        sizes.append((pair[0], pair[1]))
    if not isinstance(value, list | tuple) or not value or len(sizes) < len(value):
        raise InputError(
            f"data.resolutions must list sides or [height, width] pairs of at least 8 pixels, got {value}; "
            "for example [192, 224] or [[224, 224], [160, 320]]."
        )
    return tuple(sizes)


def crop_generator(seed: int, epoch: int, key: ImageKey) -> np.random.Generator:
    """Return what the crop of an image in an epoch is drawn from: the same whenever and wherever it is asked."""
    group = int.from_bytes(hashlib.sha256(key.group.encode()).digest()[:8], "little")
    return np.random.default_rng((seed, epoch, group, key.row))


def draw_crop(
    size: tuple[int, int], settings: CropSettings, rng: np.random.Generator, aspect_ratio: float = 1.0
) -> Crop:
    """Draw a random resized crop.

    Its shape lies between that of an undistorted cut and that of a whole image squeezed to the resolution, which is
    what the saved image processor gives a student later; `max_aspect_ratio` widens the range on both sides. So an image
    of any shape can be cut; for a square image and resolution this is torchvision's `RandomResizedCrop`.

    Args:
        size: (width, height) of the decoded image, as `PIL.Image.Image.size`.
        settings: ranges.
        rng: see `crop_generator`.
        aspect_ratio: width / height of the resolution that the crop will be resized to.
    """
    width, height = size
    extremes = (aspect_ratio, width / height)
    ratio = [min(extremes) / settings.max_aspect_ratio, max(extremes) * settings.max_aspect_ratio]
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        shape_only = torch.empty(1, height, width, device="meta")
        top, left, height, width = RandomResizedCrop.get_params(shape_only, [settings.min_crop_area, 1.0], ratio)
        flip = settings.flip and torch.rand(1).item() < 0.5
    jitter = int(rng.integers(2**31)) if settings.color_jitter else None
    return Crop(top, left, height, width, flip, jitter)


def cut(image: Image.Image, crop: Crop, resolution: Resolution, color_jitter: float = 0.0) -> Tensor:
    """Apply a crop.

    Args:
        image: RGB.
        crop: its box lies inside the image.
        resolution: size of the result.
        color_jitter: strength, see `CropSettings`; used when the crop has a seed for it.

    Returns:
        [3, H, W], uint8.
    """
    box = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    # Resized as a tensor: faster than by Pillow, and rounds otherwise here and there.
    pixels = F.resize(F.pil_to_tensor(box), list(resolution), BICUBIC)
    if crop.flip:
        pixels = F.horizontal_flip(pixels)
    if crop.jitter is not None and color_jitter:
        jitter = v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 4)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(crop.jitter)
            pixels = jitter(pixels)
    return pixels


def squeeze(image: Image.Image, resolution: Resolution) -> Tensor:
    """Resize a whole image as the saved image processor does it.

    Returns:
        [3, H, W], uint8.
    """
    return F.pil_to_tensor(F.resize(image, list(resolution), BICUBIC))


def resolution_of_step(resolutions: Sequence[Resolution], seed: int, step: int) -> Resolution:
    """Return the size of all crops of an optimizer step, equal in every process."""
    if len(resolutions) == 1:
        return resolutions[0]
    return resolutions[int(np.random.default_rng((seed, step)).integers(len(resolutions)))]


class Views(Protocol):
    """Turns a decoded image into a sample: how it is cut, and what else joins the pixels."""

    def cut(self, image: Image.Image, key: ImageKey, epoch: int, resolution: Resolution) -> dict[str, Tensor]:
        """Return a training sample, at least {"pixel_values": [3, H, W], uint8}."""

    def whole(self, image: Image.Image, key: ImageKey, resolution: Resolution) -> dict[str, Tensor]:
        """Return a held-out sample, at least {"pixel_values": [3, H, W], uint8}."""


class RandomViews:
    """A new crop of each image in each epoch.

    Args:
        settings: ranges of the crops.
        seed: with epoch and key it decides a crop.
    """

    def __init__(self, settings: CropSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed

    def cut(self, image: Image.Image, key: ImageKey, epoch: int, resolution: Resolution) -> dict[str, Tensor]:
        """Return {"pixel_values": [3, H, W], uint8}, a random crop."""
        rng = crop_generator(self.seed, epoch, key)
        crop = draw_crop(image.size, self.settings, rng, aspect_ratio=resolution[1] / resolution[0])
        return {"pixel_values": cut(image, crop, resolution, self.settings.color_jitter)}

    def whole(self, image: Image.Image, key: ImageKey, resolution: Resolution) -> dict[str, Tensor]:
        """Return {"pixel_values": [3, H, W], uint8}, the whole image, squeezed."""
        return {"pixel_values": squeeze(image, resolution)}
