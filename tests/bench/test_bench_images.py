import io

import pytest
import torch
from PIL import Image

from sf_mllm.bench.images import DISTINCT_IMAGES, Images, draw
from sf_mllm.bench.sizes import ImageSize, parse_size
from sf_mllm.errors import InputError


@pytest.mark.parametrize("size", [ImageSize(64, 64), ImageSize(200, 48), ImageSize(33, 90)])
def test_drawings_have_the_size_and_something_everywhere(size):
    images = draw(3, size)
    assert images.shape == (3, 3, size.height, size.width) and images.dtype == torch.uint8
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()
    for part in images.split(min(size) // 2, dim=3 if size.width >= size.height else 2):
        assert part.float().std() > 5  # grey levels
        assert (part == 0).float().mean() < 0.5


def test_drawings_with_other_numbers_are_others():
    size = ImageSize(64, 32)
    assert torch.equal(draw(2, size, first=3), draw(5, size)[3:])
    assert len(torch.unique(torch.cat([draw(4, size), draw(4, size, first=4)]).flatten(1), dim=0)) == 8


def test_a_large_batch_repeats_a_few_different_images():
    pixels = Images().pixels(DISTINCT_IMAGES + 2, ImageSize(32, 32))
    assert len(pixels) == DISTINCT_IMAGES + 2
    assert torch.equal(pixels[0], pixels[DISTINCT_IMAGES])
    assert len(torch.unique(pixels.flatten(1), dim=0)) == DISTINCT_IMAGES


def test_own_images_are_resized_and_their_files_left_alone(tmp_path):
    Image.new("RGB", (50, 20), (200, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 60), (10, 200, 10)).save(tmp_path / "b.png")
    images = Images(tmp_path)
    assert images.name == str(tmp_path)
    pixels = images.pixels(3, ImageSize(64, 32))
    assert pixels.shape == (3, 3, 32, 64)
    assert [image[:, 0, 0].tolist() for image in pixels] == [[200, 10, 10], [10, 200, 10], [200, 10, 10]]
    assert images.files(5, ImageSize(8, 8)) == [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert [picture.size for picture in images.pictures(5, ImageSize(8, 8))] == [(50, 20), (30, 60)]


def test_files_of_drawings_are_jpeg_of_the_size():
    (file,) = Images().files(1, ImageSize(80, 48))
    with Image.open(io.BytesIO(file)) as image:
        assert image.format == "JPEG" and image.size == (80, 48)


def test_sizes():
    assert parse_size("224") == (224, 224)
    assert parse_size("1792x224") == (1792, 224) and str(parse_size("1792X224")) == "1792x224"


@pytest.mark.parametrize("text", ["", "x", "224x", "31", "8193", "224x224x3", "-224", "2.5", "²²²"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(InputError, match=r"width by height such as 1792x224, from 32 to 8192 pixels\.$"):
        parse_size(text)
