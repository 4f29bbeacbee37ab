"""Preprocessing: sizes, values, and the published settings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sf_mllm import SparseFormerImageProcessor
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.errors import InputError


def make_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(224, 224), (400, 100), (1, 1), (30, 1000)])
def test_the_whole_image_becomes_a_square(size: tuple[int, int]) -> None:
    pixels = SparseFormerImageProcessor()(make_image(*size), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224) and torch.isfinite(pixels).all()


def test_values_at_native_size_are_normalised_pixels() -> None:
    image = make_image(224, 224)
    pixels = SparseFormerImageProcessor()(image, return_tensors="pt").pixel_values[0]
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = (raw - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    torch.testing.assert_close(pixels, expected)


def test_the_default_resize_is_that_of_clip_without_the_crop() -> None:
    image = make_image(500, 300)
    expected = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize((224, 224), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )(image)
    torch.testing.assert_close(SparseFormerImageProcessor()(image, return_tensors="pt").pixel_values[0], expected)


def test_published_preprocessing_against_torchvision() -> None:
    image = make_image(500, 300)
    pixels = SparseFormerImageProcessor.from_name("sparseformer_btsp_augreg_base")(image, return_tensors="pt")
    expected = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(256, v2.InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )(image)
    torch.testing.assert_close(pixels.pixel_values[0], expected)


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("sparseformer_v1_tiny", 0.485),
        ("sparseformer_btsp_augreg_large", 0.5),
        ("sparseformer_btsp_openai_clip_base", CLIP_MEAN[0]),
    ],
)
def test_each_family_has_its_own_mean(name: str, mean: float) -> None:
    assert SparseFormerImageProcessor.from_name(name).image_mean[0] == mean


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="Did you mean"):
        SparseFormerImageProcessor.from_name("sparseformer_btsp_openai_clip_bas")


def test_save_and_load(tmp_path: Path) -> None:
    processor = SparseFormerImageProcessor(size={"shortest_edge": 64}, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    image = make_image(200, 100)
    pixels = SparseFormerImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 64, 128)
    torch.testing.assert_close(pixels, processor(image, return_tensors="pt").pixel_values)
