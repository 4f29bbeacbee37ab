"""Pictures of digits, and their export as files."""

import pytest
import torch

from scripts.demo.digit_images import main
from scripts.demo.digits import BACKGROUND, DIGITS, HELD_OUT_SEED, draw_digits
from sf_mllm.data.image_io import open_image
from sf_mllm.data.scenes.language import objects_of
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes
from sf_mllm.data.zero_shot_tasks import read_task_folder
from sf_mllm.errors import InputError

INDICES = torch.arange(200)
SEED = 7


@pytest.fixture(scope="module")
def pictures():
    return draw_digits(INDICES, SEED, 96)


def test_a_picture_depends_on_its_index_alone(pictures):
    again = draw_digits(INDICES[[150, 3]], SEED, 96)
    for name, values in vars(pictures).items():
        torch.testing.assert_close(getattr(again, name), values[[150, 3]], rtol=0, atol=0)
    other = draw_digits(INDICES, SEED + 1, 96)
    assert (other.pixels != pictures.pixels).flatten(1).any(dim=1).all()


def test_labels_are_those_of_the_scene(pictures):
    scenes = sample_scenes(INDICES, ScenesConfig(SEED, 1, 1, domain="clutter", shapes=DIGITS))
    objects = [item for (item,) in objects_of(scenes)]
    assert [DIGITS[label] for label in pictures.labels.tolist()] == [item.shape for item in objects]
    assert len(DIGITS) == 10 and pictures.labels.unique().tolist() == list(range(10))


def test_the_digit_is_where_it_is_said_to_be(pictures):
    """Backgrounds are nearly grey: saturated pixels are the digit's."""
    saturation = (pictures.pixels.amax(dim=1).int() - pictures.pixels.amin(dim=1).int()).float()  # [B, H, W]
    is_digit = saturation > 0.7 * saturation.flatten(1).amax(dim=1)[:, None, None]
    place = (torch.arange(96) + 0.5) / 96
    x, y = place.expand(96, -1), place[:, None].expand(-1, 96)
    u = (x - pictures.centers[:, 0, None, None]) / pictures.radii[:, 0, None, None]
    v = (y - pictures.centers[:, 1, None, None]) / pictures.radii[:, 1, None, None]
    margin = 1.5 / 96 / pictures.radii.amin(dim=1)[:, None, None]
    assert (u.square() + v.square() < (1 + margin) ** 2)[is_digit].all()
    height = torch.where(is_digit, v, -9.0).flatten(1).amax(dim=1) - torch.where(is_digit, v, 9.0).flatten(1).amin(
        dim=1
    )
    assert height.min() > 0.8 and 1.2 < height.mean() < 2  # of 2, the diameter
    assert (pictures.centers - pictures.radii).min() >= 0 and (pictures.centers + pictures.radii).max() <= 1


def test_patch_labels_equal_a_plain_loop(pictures):
    labels = pictures.patch_labels(5, 9).view(-1, 5, 9)
    for index in range(20):
        (x, y), (a, b) = pictures.centers[index].tolist(), pictures.radii[index].tolist()
        for row in range(5):
            for column in range(9):
                is_inside = (((column + 0.5) / 9 - x) / a) ** 2 + (((row + 0.5) / 5 - y) / b) ** 2 < 1
                assert labels[index, row, column] == (pictures.labels[index] if is_inside else BACKGROUND)


def test_only_the_shapes_asked_for_are_drawn():
    config = ScenesConfig(3, 4, 4, domain="clutter", shapes=("letter b", "star"))
    objects = [item for scene in objects_of(sample_scenes(INDICES, config)) for item in scene]
    stars = sum(item.shape == "star" for item in objects)
    assert {item.shape for item in objects} == {"letter b", "star"} and 0.4 < stars / len(objects) < 0.6
    with pytest.raises(InputError, match="Shape 'digit 3' is none of domain 'plain'"):
        ScenesConfig(shapes=("digit 3",))


def test_export_writes_one_set_with_labels_and_one_without(tmp_path, capsys):
    arguments = [str(tmp_path / "out"), "--count", "5", "--held-out", "80", "--image-size", "48", "--device", "cpu"]
    assert main(arguments) == 0
    files = sorted((tmp_path / "out" / "train").iterdir())
    assert [path.name for path in files] == [f"{index:06d}.jpg" for index in range(5)]
    expected = draw_digits(torch.arange(5), 1, 48).pixels
    for path, pixels in zip(files, expected, strict=True):
        found = torch.tensor(list(open_image(path).tobytes())).view(48, 48, 3).permute(2, 0, 1)
        assert (found - pixels).abs().float().mean() < 3  # JPEG

    (task,) = read_task_folder(tmp_path / "out" / "digits", 1000)
    assert task.name == "digits" and task.texts == [name.replace(" ", "_") for name in DIGITS]
    labels = draw_digits(torch.arange(80), HELD_OUT_SEED, 48).labels
    assert labels[[int(path.stem) for path in task.images.paths]].tolist() == task.answers.tolist()
    assert len(task) == 80

    assert main(arguments) == 2
    assert "is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count 0 must be at least 1"),
        (["--held-out", "9"], "--held-out 9 at least 10"),
        (["--held-out", "10"], "there is none of digit_"),
        (["--seed", str(HELD_OUT_SEED)], "is out of range"),
    ],
)
def test_impossible_exports_are_refused(tmp_path, capsys, arguments, message):
    assert main([str(tmp_path / "out"), "--count", "1", "--image-size", "32", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
