import numpy as np
import pytest
import torch
from PIL import Image

from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.regions import draw_regions, seen_area

CROP = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}


@pytest.mark.parametrize("image_size", [(64, 64), (96, 64), (64, 120)])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 32}},
        {"size": {"shortest_edge": 32}, **CROP},
        {"size": {"height": 32, "width": 48}, **CROP},
        {"do_resize": False, **CROP},
    ],
)
def test_seen_area_is_what_a_ramp_image_shows(image_size, settings):
    """Pixel values are their own coordinates, so what the processor returns tells which part it kept."""
    width, height = image_size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255)
    image = Image.fromarray(np.stack([x, y, x], axis=-1).round().astype(np.uint8))
    processor = SparseFormerImageProcessor(**settings, do_normalize=False)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    rows, columns = pixels.shape[1:]

    left, top, right, bottom = seen_area(image.size, processor)
    expected_x = left + (torch.arange(columns) + 0.5) / columns * (right - left)
    expected_y = top + (torch.arange(rows) + 0.5) / rows * (bottom - top)
    inner = slice(2, -2)  # resampling bends the ramp at the border
    tolerance = 1.01 / min(rows, columns) if settings.get("do_center_crop") else 0.01  # crops start at whole pixels
    torch.testing.assert_close(pixels[0].mean(0)[inner], expected_x[inner], rtol=0, atol=tolerance)
    torch.testing.assert_close(pixels[1].mean(1)[inner], expected_y[inner], rtol=0, atol=tolerance)


def test_boxes_and_coverage_are_drawn_where_the_regions_are():
    image = Image.new("RGB", (72, 72), (200, 200, 200))
    rois = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.0, 0.0]])  # the second one given backwards
    picture = np.asarray(draw_regions(image, rois)).astype(int)
    left, right = picture[24:744, 24:744], picture[24:744, 768:1488]

    assert (left[500:, 500:] == 200).all()  # no region
    assert (left[300, 300] != 200).any() and abs(left[300, 300] - 200).max() < 40  # inside: tinted, still visible
    assert abs(left[100, 355:362] - 200).max() > 60  # across the edge of the large one
    assert (right[100, 100] == 200).all()  # both regions: full brightness
    assert (right[300, 300] == round(200 * 0.56)).all()  # one of two
    assert (right[500, 500] == round(200 * 0.12)).all()  # none


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (500, 300)])
def test_any_image_size_and_regions_outside(size):
    rois = torch.tensor([[-0.5, -0.5, 1.5, 1.5], [0.4, 0.4, 0.4, 0.4], [2.0, 2.0, 3.0, 3.0]])
    picture = draw_regions(Image.new("RGB", size), rois)
    assert picture.mode == "RGB" and max(picture.size) < 1600
