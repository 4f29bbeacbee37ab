import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sf_mllm.data.augment import Crop, ImageKey
from sf_mllm.data.images import HELD_OUT
from sf_mllm.data.quantised_patches import quantise
from sf_mllm.data.teacher_store import TeacherStore, bytes_per_crop
from sf_mllm.data.teacher_store_writer import StoreWriter
from sf_mllm.errors import InputError

ORIGIN = {"teacher weights": "abc", "teacher preprocessing": (32, [0.4, 0.5]), "data.resolution": 40}
LAYOUT = {"store.crops": 3, "store.grid": 2}
CROPS, SIZE, GRID, WIDTH = 3, 6, 2, 8


def make_group(name, rows, num_crops=CROPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = len(rows)
    patches, scales = quantise(torch.randn(images * num_crops, WIDTH, 4, 4, generator=generator), GRID)
    return {
        "keys": [ImageKey(name, row) for row in rows],
        "sizes": [(100 + row, 90) for row in rows],
        "crops": [
            [Crop(row, k, 30 + row, 20 + k, bool(k % 2), 2**62 + row if k else None) for k in range(num_crops)]
            for row in rows
        ],
        "embedding": torch.randn(images, num_crops, SIZE, generator=generator),
        "patches": patches.unflatten(0, (images, num_crops)),
        "scales": scales.unflatten(0, (images, num_crops)),
    }


GROUPS = {
    "a.tar": make_group("a.tar", [2, 0, 5], seed=1),
    "b.tar": make_group("b.tar", [1], seed=2),
    HELD_OUT: make_group(HELD_OUT, [1, 0], num_crops=1, seed=3),
}


def write(directory, *groups):
    writer = StoreWriter(directory, ORIGIN, LAYOUT, ["a.tar", "b.tar"])
    for group in groups or writer.missing:
        writer.write_group(group, **GROUPS[group], num_unreadable=int(group == "b.tar"))
    return writer


@pytest.fixture
def directory(tmp_path):
    assert write(tmp_path / "store").finish()
    return tmp_path / "store"


def test_what_is_written_is_read(directory):
    store = TeacherStore.open(directory)
    store.refuse_other_origin(ORIGIN)
    for content in GROUPS.values():
        num_crops = content["embedding"].shape[1]
        for place, key in enumerate(content["keys"]):
            for epoch in range(7):
                crop, targets = store.read(key, epoch, (100 + key.row, 90))
                number = epoch % num_crops
                assert crop == content["crops"][place][number]
                expected = {
                    "teacher_embedding": content["embedding"][place, number].half(),
                    "teacher_patches": content["patches"][place, number],
                    "teacher_scales": content["scales"][place, number],
                }
                torch.testing.assert_close(targets, expected, rtol=0, atol=0)


def test_cost_and_content_are_recorded(directory):
    content = TeacherStore.open(directory).description["content"]
    size = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    cost = bytes_per_crop(SIZE, WIDTH, GRID)
    assert content == {
        "images": 6, "crops": 14, "unreadable_images": 1, "grid": GRID, "bytes_per_crop": cost, "bytes": size,
    }  # fmt: skip
    # What remains is the header and the index of each file.
    index = 8 * (6 + 2 + 2)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in directory.rglob("*.safetensors"))
    assert size - index - headers == 14 * cost


class Reads(Dataset):
    def __init__(self, store):
        self.store = store
        store.read(ImageKey("a.tar", 0), 0, (100, 90))  # open before the workers start

    def __len__(self):
        return 6

    def __getitem__(self, index):
        row = (2, 0, 5)[index % 3]
        return self.store.read(ImageKey("a.tar", row), index // 3, (100 + row, 90))[1]


def test_workers_read_the_same(directory):
    dataset = Reads(TeacherStore.open(directory))
    expected = default_collate([dataset[i] for i in range(6)])
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork"))
    for name, values in expected.items():
        torch.testing.assert_close(torch.cat([batch[name] for batch in batches]), values, rtol=0, atol=0)
    spawned = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(default_collate([spawned[i] for i in range(6)]), expected, rtol=0, atol=0)


def test_an_interrupted_store_is_refused_and_gone_on_with(tmp_path):
    directory = tmp_path / "store"
    writer = write(directory, "a.tar")
    assert writer.finish() is None
    with pytest.raises(InputError, match=r"is not complete \(1 of 3 groups\)"):
        TeacherStore.open(directory)
    (directory / "groups" / "000001.partial").write_bytes(b"what a kill leaves")
    before = (directory / "groups" / "000000.safetensors").stat().st_mtime_ns
    writer = StoreWriter(directory, ORIGIN, LAYOUT, ["a.tar", "b.tar"])
    assert writer.missing == [HELD_OUT, "b.tar"]
    write(directory, "b.tar")
    assert write(directory, HELD_OUT).finish()["images"] == 6
    assert (directory / "groups" / "000000.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in directory.rglob("*") if path.is_file()) == [
        "000000.safetensors", "000001.safetensors", f"{HELD_OUT}.safetensors", "store.json",
    ]  # fmt: skip


def test_another_origin_is_refused_by_reader_and_writer(directory):
    other = ORIGIN | {"data.resolution": 48}
    with pytest.raises(InputError, match=r"belongs to another run: data.resolution was 40, is 48; set these"):
        TeacherStore.open(directory).refuse_other_origin(other)
    for origin, layout, what in (
        (other, LAYOUT, "data.resolution was 40, is 48"),
        (ORIGIN, LAYOUT | {"store.grid": 3}, "store.grid was 2, is 3"),
    ):
        with pytest.raises(InputError, match=rf"another kind: {what}; name another directory"):
            StoreWriter(directory, origin, layout, ["a.tar", "b.tar"])


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="something that is no teacher store"):
        StoreWriter(tmp_path, ORIGIN, LAYOUT, [])
    with pytest.raises(InputError, match=r"There is no teacher store in .* make it with python -m"):
        TeacherStore.open(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(InputError, match="does not describe a teacher store"):
        TeacherStore.open(tmp_path)


def test_another_version_is_refused(directory):
    path = directory / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(InputError, match="has version 2, this program reads version 1"):
        TeacherStore.open(directory)


def test_missing_and_truncated_files_are_refused_at_once_and_made_again(directory):
    path = directory / "groups" / "000001.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=rf"000001.safetensors has {size - 5} bytes instead of {size}; the command"):
        TeacherStore.open(directory)
    assert StoreWriter(directory, ORIGIN, LAYOUT, ["a.tar", "b.tar"]).missing == ["b.tar"]
    assert not path.exists()
    with pytest.raises(InputError, match=r"000001.safetensors is missing"):
        TeacherStore.open(directory)
    assert write(directory).finish()
    assert TeacherStore.open(directory).read(ImageKey("b.tar", 1), 0, (101, 90))


@pytest.mark.parametrize("name", ["index", "crops", "embedding", "patches", "scales", "checksums"])
def test_changed_content_is_refused_when_read(directory, name):
    path = directory / "groups" / "000000.safetensors"
    content = bytearray(path.read_bytes())
    header_size = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + header_size])[name]["data_offsets"][0]
    # The second row's place among the images, otherwise the lowest bit of a tensor's first number.
    content[8 + header_size + begin + (8 * 2 if name == "index" else 0)] ^= 1
    path.write_bytes(content)
    store = TeacherStore.open(directory)
    with pytest.raises(InputError, match=r"content of groups/000000.safetensors is not what was written"):
        for row in (0, 2, 5):
            store.read(ImageKey("a.tar", row), 0, (100 + row, 90))


def test_a_file_that_is_no_safetensors_is_refused_when_read(directory):
    path = directory / "groups" / "000000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(InputError, match=r"groups/000000.safetensors cannot be read \("):
        TeacherStore.open(directory).read(ImageKey("a.tar", 0), 0, (100, 90))


def test_another_image_in_its_place_is_refused(directory):
    with pytest.raises(InputError, match=r"Image 2 of group 'a.tar' had 102x90 pixels when .* and has 90x102 now"):
        TeacherStore.open(directory).read(ImageKey("a.tar", 2), 0, (90, 102))


@pytest.mark.parametrize(
    ("group", "row", "message"),
    [
        ("c.tar", 0, "has no group 'c.tar'; it was made of other images"),
        ("a.tar", 1, "no targets of image 1 in group 'a.tar'"),
        ("a.tar", 6, "no targets of image 6 in group 'a.tar'"),
    ],
)
def test_an_image_without_targets_is_refused(directory, group, row, message):
    with pytest.raises(InputError, match=message):
        TeacherStore.open(directory).read(ImageKey(group, row), 0, (100 + row, 90))


def test_a_group_without_images_is_possible(tmp_path):
    writer = write(tmp_path, "a.tar", HELD_OUT)
    writer.write_group("b.tar", **make_group("b.tar", []), num_unreadable=4)
    assert writer.finish() == writer.description["content"]
    assert writer.description["content"]["unreadable_images"] == 4


@pytest.mark.parametrize("damaged", ["embedding", "feature map"])
def test_outputs_that_are_not_finite_are_refused(tmp_path, damaged):
    content = make_group("a.tar", [0])
    if damaged == "embedding":
        content["embedding"][0, 0, 0] = 1e6  # beyond fp16
    else:
        content["scales"][0, 0, 0, 0] = quantise(torch.full((1, 1, 1, 1), torch.nan), 1)[1].item()
    with pytest.raises(InputError, match="not finite in half precision"):
        StoreWriter(tmp_path, ORIGIN, LAYOUT, ["a.tar"]).write_group("a.tar", **content, num_unreadable=0)


def test_a_full_disk_gets_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sf_mllm.data.teacher_store_writer.save_file", fail)
    with pytest.raises(
        InputError, match=r"000000.safetensors' cannot be written: .*No space left on device; make room"
    ):
        write(tmp_path / "store", "a.tar")
