"""What is measured on: drawings of any size and shape, or the user's own images; never zeros, which cost GPUs less."""

import functools
import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sf_mllm.bench.sizes import ImageSize
from sf_mllm.data.image_io import open_image
from sf_mllm.data.image_sources import find_images
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes

DISTINCT_IMAGES = 32
"""Larger batches repeat them."""
_SCENES = ScenesConfig(seed=4, domain="clutter")
_PIXELS_AT_ONCE = 2_000_000
_JPEG_QUALITY = 90


class Images:
    """A few different images.

    Args:
        folder: of the user's images, taken in the order of their names; None draws some.

    Raises:
        InputError: the folder holds no images.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.name = "drawings" if folder is None else str(folder)
        self.paths = None if folder is None else find_images(folder)[:DISTINCT_IMAGES]
        self._make_once = functools.lru_cache(maxsize=2)(self._make_pixels)

    def pixels(self, count: int, size: ImageSize) -> Tensor:
        """Return images of one size: [count, 3, height, width] uint8, RGB."""
        distinct = self._make_once(min(count, DISTINCT_IMAGES), size)
        return distinct[torch.arange(count) % len(distinct)]

    def pictures(self, count: int, size: ImageSize) -> list[Image.Image]:
        """Return different images: the user's as they are, or drawings of this size."""
        if self.paths is not None:
            return [open_image(path) for path in self.paths[:count]]
        pixels = self.pixels(min(count, DISTINCT_IMAGES), size)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]

    def files(self, count: int, size: ImageSize) -> list[bytes]:
        """Return the content of image files: the user's as they are, or drawings of this size as JPEG."""
        if self.paths is not None:
            return [path.read_bytes() for path in self.paths[:count]]
        files = []
        for picture in self.pictures(count, size):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=_JPEG_QUALITY)
            files.append(file.getvalue())
        return files

    def _make_pixels(self, count: int, size: ImageSize) -> Tensor:
        if self.paths is None:
            return draw(count, size)
        images = (open_image(path).resize(size, Image.Resampling.BICUBIC) for path in self.paths[:count])
        return torch.stack([pil_to_tensor(image) for image in images])


def draw(count: int, size: ImageSize, first: int = 0) -> Tensor:
    """Draw images of any shape, long ones as several scenes side by side: [count, 3, height, width] uint8.

    Args:
        count: of the images.
        size: of each.
        first: number of the first one; each number stands for other scenes.
    """
    side, length = min(size), max(size)
    scenes_each = math.ceil(length / side)
    at_once = max(1, _PIXELS_AT_ONCE // side**2)
    indices = torch.arange(first * scenes_each, (first + count) * scenes_each)
    scenes = torch.cat([render(sample_scenes(some, _SCENES), side) for some in indices.split(at_once)])
    axis = 2 if size.width >= size.height else 1
    strips = [torch.cat(list(some), dim=axis) for some in scenes.split(scenes_each)]  # [3, side, scenes_each * side]
    return torch.stack(strips)[:, :, : size.height, : size.width].contiguous()
