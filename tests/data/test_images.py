import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sf_mllm.data.augment import CropSettings, ImageKey, RandomViews
from sf_mllm.data.image_sources import FolderImages
from sf_mllm.data.images import HELD_OUT, HeldOutImages, TrainingImages, hold_out
from sf_mllm.data.shared_log import SharedLog, UnreadableImages
from sf_mllm.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Twenty images whose grey level is ten times their number, one of them broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (30, 20), (index * 10,) * 3).save(folder / f"{index:02d}.png")
    (folder / "07.png").write_text("no image")
    return folder


class KeyedViews(RandomViews):
    """Also says which image in which epoch became a sample."""

    def cut(self, image, key, epoch, resolution):
        return super().cut(image, key, epoch, resolution) | {"key": key, "epoch": epoch}

    def whole(self, image, key, resolution):
        return super().whole(image, key, resolution) | {"key": key}


def make_dataset(folder, num_samples=50, seed=3, share=0.05, step_size=4, sizes=((8, 8),), indices=None):
    source = FolderImages(folder)
    settings = CropSettings(min_crop_area=0.5, resolutions=sizes)
    return TrainingImages(
        source,
        np.arange(len(source)) if indices is None else np.array(indices),
        num_samples=num_samples,
        step_size=step_size,
        views=KeyedViews(settings, seed),
        resolutions=sizes,
        seed=seed,
        unreadable=UnreadableImages(SharedLog(folder.parent / "unreadable.jsonl"), share),
        num_images=len(source),
    )


def level(sample):
    return round(sample["pixel_values"].float().mean().item() / 10)


def levels(dataset):
    return [level(dataset[i]) for i in range(len(dataset))]


def test_held_out_images_are_disjoint_and_fixed_by_the_seed():
    training, held_out = hold_out(20, 5, seed=1)
    assert len(held_out) == 5 and sorted([*training, *held_out]) == list(range(20))
    assert [list(part) for part in hold_out(20, 5, seed=1)] == [list(training), list(held_out)]
    assert list(hold_out(20, 5, seed=2)[1]) != list(held_out)
    with pytest.raises(InputError, match="hold out fewer"):
        hold_out(20, 20, seed=1)


def test_every_epoch_has_each_file_once_in_another_order(folder):
    (folder / "07.png").unlink()
    dataset = make_dataset(folder, num_samples=3 * 19)
    found = levels(dataset)
    epochs = [found[start : start + 19] for start in (0, 19, 38)]
    assert all(sorted(epoch) == [i for i in range(20) if i != 7] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert dataset.epochs_after(len(dataset)) == 3
    assert levels(make_dataset(folder, num_samples=19, seed=4)) != epochs[0]


def test_a_position_gives_the_same_crop_whatever_came_before(folder):
    rng = np.random.default_rng(0)
    for index in range(20):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    in_order = [make_dataset(folder)[i]["pixel_values"] for i in range(50)]
    torch.manual_seed(123)
    dataset = make_dataset(folder)
    for position in (49, 0, 17, 49):
        torch.testing.assert_close(dataset[position]["pixel_values"], in_order[position], rtol=0, atol=0)
    loader = DataLoader(dataset, batch_size=7, num_workers=2, collate_fn=list)
    crops = [sample["pixel_values"] for batch in loader for sample in batch]
    torch.testing.assert_close(crops, in_order, rtol=0, atol=0)
    assert len({crop.numpy().tobytes() for crop in in_order}) == 50  # the same image is cut anew in each epoch


def test_augmentation_leaves_the_global_generator_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_dataset(folder)[0]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_samples_are_named_by_their_place_in_the_source(folder):
    dataset = make_dataset(folder, num_samples=30, indices=[2, 3, 5, 19])
    for position in range(30):
        sample = dataset[position]
        assert sample["key"] == ImageKey("000000", level(sample)) and sample["epoch"] == position // 4


def test_all_crops_of_a_step_have_one_of_the_sizes(folder):
    dataset = make_dataset(folder, num_samples=48, sizes=((8, 8), (6, 12)))
    shapes = [dataset[i]["pixel_values"].shape for i in range(48)]
    assert all(len(set(shapes[start : start + 4])) == 1 for start in range(0, 48, 4))
    assert set(shapes) == {(3, 8, 8), (3, 6, 12)}


def test_a_broken_file_is_named_counted_and_replaced_reproducibly(folder, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset(folder)
        found = levels(dataset)
        assert 7 not in found and len(found) == 50
        assert len(dataset.unreadable) == 1
        assert levels(make_dataset(folder)) == found  # another start of the run
        assert len(make_dataset(folder).unreadable) == 1
    assert caplog.text.count("07.png") == 1
    assert all(sample["key"].row == level(sample) for sample in map(dataset.__getitem__, range(50)))


def test_workers_count_broken_files_in_the_parent(folder):
    dataset = make_dataset(folder)
    for _ in DataLoader(dataset, batch_size=10, num_workers=2, collate_fn=len):
        pass
    assert len(dataset.unreadable) == 1


def test_too_many_broken_files_stop_the_run(folder):
    (folder / "11.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 20 images cannot be read, 1 are allowed.*\.png"):
        levels(make_dataset(folder))


def test_a_folder_of_broken_files_ends(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / f"images/{index}.jpg").write_text("no image")
    with pytest.raises(InputError, match="1 of 3 images"):
        make_dataset(tmp_path / "images")[0]


def test_training_and_held_out_images_are_counted_together(folder):
    (folder / "11.png").write_bytes(b"")
    training = make_dataset(folder, share=0.1, indices=range(10))
    held_out = HeldOutImages(
        training.source,
        np.arange(10, 20),
        views=training.views,
        resolution=(8, 8),
        unreadable=training.unreadable,
        num_images=20,
    )
    found = levels(held_out)
    assert [found[i] for i in range(10) if i != 1] == [i for i in range(10, 20) if i != 11]
    assert found[1] in range(10, 20) and held_out[1]["key"] == ImageKey(HELD_OUT, found[1] - 10)
    levels(training)
    assert len(training.unreadable) == 2
    (folder / "12.png").write_bytes(b"")
    with pytest.raises(InputError, match="3 of 20 images cannot be read, 2 are allowed"):
        levels(held_out)


def test_held_out_images_are_whole(folder):
    """A picture black on its left and white on its right stays so: nothing is cut off."""
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 30:] = 255
    Image.fromarray(pixels).save(folder / "00.png")
    dataset = make_dataset(folder)
    held_out = HeldOutImages(
        dataset.source,
        np.array([0]),
        views=dataset.views,
        resolution=(10, 10),
        unreadable=dataset.unreadable,
        num_images=20,
    )
    item = held_out[0]["pixel_values"]
    assert item.dtype == torch.uint8 and item.shape == (3, 10, 10)
    assert item[:, :, :4].max() <= 1 and item[:, :, 6:].min() >= 254


def test_a_torn_line_of_a_shared_log_is_left_out(tmp_path):
    log, other = SharedLog(tmp_path / "log.jsonl"), SharedLog(tmp_path / "log.jsonl")
    assert log.read_new() == []
    log.append({"image": "a"})
    assert other.read_new() == [{"image": "a"}] and other.read_new() == []
    with log.path.open("a") as file:
        file.write('{"image": "b')
    assert other.read_new() == [] and log.read_new() == [{"image": "a"}]
    log.append({"image": "c"})  # ends the torn line
    log.append({"image": "d"})
    assert other.read_new() == [{"image": "d"}]
