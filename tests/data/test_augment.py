import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sf_mllm.data.augment import (
    BICUBIC,
    Crop,
    CropSettings,
    ImageKey,
    RandomViews,
    crop_generator,
    cut,
    draw_crop,
    parse_resolutions,
    resolution_of_step,
    squeeze,
)
from sf_mllm.errors import InputError


def noise(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def draws(size, count=300, aspect_ratio=1.0, **settings):
    settings = CropSettings(**settings)
    return [
        draw_crop(size, settings, crop_generator(1, epoch, ImageKey("a", 0)), aspect_ratio) for epoch in range(count)
    ]


@pytest.mark.parametrize("first", ["a tensor", "Pillow's"])
def test_a_square_image_is_cut_as_torchvision_does(first):
    """Exactly so from a tensor; Pillow rounds and clips between its two passes, which noise brings out most."""
    image = noise(50, 50)
    augment = [v2.RandomResizedCrop(24, (0.4, 1.0), interpolation=BICUBIC), v2.RandomHorizontalFlip()]
    augment.insert(0 if first == "a tensor" else 2, v2.PILToTensor())
    for seed in range(20):
        crop = draw_crop(image.size, CropSettings(), np.random.default_rng(seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng(seed).integers(2**63)))
            expected = v2.Compose(augment)(image)
        difference = (cut(image, crop, (24, 24)).int() - expected.int()).abs()
        if first == "a tensor":
            assert difference.max() == 0
        else:
            assert difference.float().mean() < 0.5 and difference.max() < 10  # a shift by a pixel makes it 60


@pytest.mark.parametrize("size", [(400, 100), (60, 300), (31, 17), (1, 1), (500, 2)])
def test_any_shape_is_cut_inside_the_image_with_the_area_that_is_asked_for(size):
    width, height = size
    boxes = draws(size, min_crop_area=0.4)
    for box in boxes:
        assert 0 <= box.top <= box.top + box.height <= height and box.height > 0
        assert 0 <= box.left <= box.left + box.width <= width and box.width > 0
    if min(size) > 10:  # not where rounding to pixels decides
        shares = [box.height * box.width / (width * height) for box in boxes]
        assert min(shares) > 0.38 and max(shares) > 0.95
        assert len({(box.top, box.left) for box in boxes}) > 50


def test_shapes_lie_between_undistorted_and_squeezed():
    ratios = [box.width / box.height for box in draws((400, 100), min_crop_area=0.1, max_aspect_ratio=1.25)]
    assert 0.75 < min(ratios) < 1.1 and 4 < max(ratios) < 5.1
    ratios = [box.width / box.height for box in draws((400, 100), min_crop_area=0.1, aspect_ratio=4.0)]
    assert 2.9 < min(ratios) < 3.2 and 5 < max(ratios) < 5.4


def test_a_crop_depends_on_seed_epoch_and_key_only():
    def crop(seed, epoch, group, row):
        return draw_crop((80, 60), CropSettings(color_jitter=0.4), crop_generator(seed, epoch, ImageKey(group, row)))

    one = crop(0, 0, "a", 0)
    torch.manual_seed(7)
    assert crop(0, 0, "a", 0) == one
    assert len({one, crop(1, 0, "a", 0), crop(0, 1, "a", 0), crop(0, 0, "b", 0), crop(0, 0, "a", 1)}) == 5


def test_half_of_the_crops_are_mirrored_unless_none_shall_be():
    assert 100 < sum(box.flip for box in draws((50, 50))) < 200
    assert not any(box.flip for box in draws((50, 50), flip=False))


def test_a_cut_is_the_box_resized_and_mirrored():
    image = noise(50, 40)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    box = pixels[:, 10:25, 5:35]
    torch.testing.assert_close(cut(image, Crop(10, 5, 15, 30, False, None), (15, 30)), box, rtol=0, atol=0)
    torch.testing.assert_close(cut(image, Crop(10, 5, 15, 30, True, None), (15, 30)), box.flip(2), rtol=0, atol=0)
    assert cut(image, Crop(0, 0, 40, 50, False, None), (8, 16)).shape == (3, 8, 16)


def test_jitter_changes_colours_reproducibly():
    image = noise(20, 20)
    plain, first, second = (Crop(0, 0, 20, 20, False, jitter) for jitter in (None, 1, 2))
    assert all(box.jitter is None for box in draws((20, 20), 5))
    assert len({box.jitter for box in draws((20, 20), 5, color_jitter=0.5)}) == 5
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cuts = [cut(image, crop, (20, 20), 0.5) for crop in (plain, first, second)]
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)  # the global generator is left alone
    assert not torch.equal(cuts[0], cuts[1]) and not torch.equal(cuts[1], cuts[2])
    torch.testing.assert_close(cut(image, first, (20, 20), 0.5), cuts[1], rtol=0, atol=0)
    torch.testing.assert_close(cut(image, first, (20, 20)), cuts[0], rtol=0, atol=0)


def test_squeezing_keeps_the_whole_image():
    image = Image.fromarray(np.repeat(np.repeat(np.uint8([[[0] * 3, [255] * 3]]), 20, 0), 30, 1))
    pixels = squeeze(image, (10, 16))
    assert pixels.shape == (3, 10, 16) and pixels[:, :, :7].max() <= 1 and pixels[:, :, 9:].min() >= 254


def test_each_step_has_one_of_the_resolutions():
    sizes = ((16, 16), (8, 32))
    found = [resolution_of_step(sizes, 0, step) for step in range(40)]
    assert set(found) == set(sizes)
    assert found == [resolution_of_step(sizes, 0, step) for step in range(40)]
    assert found != [resolution_of_step(sizes, 1, step) for step in range(40)]


def test_resolutions_are_sides_or_pairs():
    assert parse_resolutions([224, [160, 320]]) == ((224, 224), (160, 320))
    for wrong in (224, [], [4], [[8, 8, 8]], ["a"], [True], [[8.5, 9]]):
        with pytest.raises(InputError, match=r"data\.resolutions must list sides"):
            parse_resolutions(wrong)


def test_random_views_cut_each_epoch_anew_and_keep_held_out_images_whole():
    image, key, views = noise(60, 20), ImageKey("a", 3), RandomViews(CropSettings(color_jitter=0.3), seed=4)
    crop = draw_crop((60, 20), views.settings, crop_generator(4, 2, key), aspect_ratio=2.0)
    expected = {"pixel_values": cut(image, crop, (8, 16), 0.3)}
    torch.testing.assert_close(views.cut(image, key, 2, (8, 16)), expected, rtol=0, atol=0)
    assert not torch.equal(views.cut(image, key, 3, (8, 16))["pixel_values"], expected["pixel_values"])
    expected = {"pixel_values": squeeze(image, (8, 16))}
    torch.testing.assert_close(views.whole(image, key, (8, 16)), expected, rtol=0, atol=0)
