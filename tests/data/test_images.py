import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sf_mllm.data.images import HeldOutImages, ImageFiles, TrainingImages, digest_names, find_images, hold_out
from sf_mllm.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Twenty images whose grey level is ten times their number, one of them broken."""
    for index in range(20):
        Image.new("RGB", (30, 20), (index * 10,) * 3).save(tmp_path / f"{index:02d}.png")
    (tmp_path / "07.png").write_text("no image")
    return tmp_path


def make_dataset(folder, num_samples=50, seed=3, share=0.05):
    files = ImageFiles(find_images(folder), share)
    return TrainingImages(files, num_samples=num_samples, resolution=8, min_crop_area=0.5, flip=True, seed=seed)


def levels(dataset):
    return [round(dataset[i]["pixel_values"].float().mean().item() / 10) for i in range(len(dataset))]


def test_images_are_found_in_subfolders_in_a_fixed_order(tmp_path):
    for name in ("b.JPG", "a.png", "sub/deep/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a folder.png").mkdir()
    paths = find_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a.png", "b.JPG", "sub/deep/c.webp"]


def test_a_folder_without_images_gets_one_sentence(tmp_path):
    with pytest.raises(InputError, match="holds no image file"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        find_images(tmp_path / "gone")


def test_held_out_images_are_disjoint_and_fixed_by_the_seed(folder):
    paths = find_images(folder)
    training, held_out = hold_out(paths, 5, seed=1)
    assert len(held_out) == 5 and sorted(training + held_out) == paths
    assert hold_out(paths, 5, seed=1) == (training, held_out)
    assert hold_out(paths, 5, seed=2)[1] != held_out
    with pytest.raises(InputError, match="hold out fewer"):
        hold_out(paths, 20, seed=1)


def test_every_epoch_has_each_file_once_in_another_order(folder):
    (folder / "07.png").unlink()
    dataset = make_dataset(folder, num_samples=3 * 19)
    found = levels(dataset)
    epochs = [found[start : start + 19] for start in (0, 19, 38)]
    assert all(sorted(epoch) == [i for i in range(20) if i != 7] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert dataset.num_epochs == 3
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
    batches = torch.cat([batch["pixel_values"] for batch in DataLoader(dataset, batch_size=7, num_workers=2)])
    torch.testing.assert_close(batches, torch.stack(in_order), rtol=0, atol=0)
    assert len({crop.numpy().tobytes() for crop in in_order}) == 50  # the same image is cut anew in each epoch


def test_augmentation_leaves_the_global_generator_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_dataset(folder)[0]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_a_broken_file_is_named_counted_and_replaced_reproducibly(folder, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset(folder)
        found = levels(dataset)
    assert 7 not in found and len(found) == 50
    assert dataset.files.num_unreadable == 1
    assert [record for record in caplog.text.splitlines() if "07.png" in record] and caplog.text.count("07.png") == 1
    assert levels(make_dataset(folder)) == found


def test_workers_count_broken_files_in_the_parent(folder):
    dataset = make_dataset(folder)
    for _ in DataLoader(dataset, batch_size=10, num_workers=2):
        pass
    assert dataset.files.num_unreadable == 1


def test_too_many_broken_files_stop_the_run(folder):
    (folder / "11.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 20 image files cannot be read, 1 are allowed.*\.png"):
        levels(make_dataset(folder))


def test_a_folder_of_broken_files_ends(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_text("no image")
    with pytest.raises(InputError, match="1 of 3 image files"):
        make_dataset(tmp_path)[0]


def test_held_out_images_are_whole(tmp_path):
    """A picture black on its left and white on its right stays so: nothing is cut off."""
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 30:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    item = HeldOutImages(ImageFiles(find_images(tmp_path), 0.0), 10)[0]["pixel_values"]
    assert item.dtype == torch.uint8 and item.shape == (3, 10, 10)
    assert item[:, :, :4].max() <= 1 and item[:, :, 6:].min() >= 254


def test_the_digest_knows_names_not_places(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.png").write_bytes(b"")
    first, second = (digest_names(find_images(tmp_path / place), tmp_path / place) for place in ("one", "two"))
    assert first == second
    (tmp_path / "two" / "b.png").write_bytes(b"")
    assert digest_names(find_images(tmp_path / "two"), tmp_path / "two") != first
