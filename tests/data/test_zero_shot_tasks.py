import json

import numpy as np
import pytest
import torch
from PIL import Image

from sf_mllm.data.zero_shot_tasks import NO_TEXT, ImageFileList, ZeroShotTask, read_task_folder
from sf_mllm.errors import InputError


def save_image(path, color, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def classes(tmp_path):
    folder = tmp_path / "my pets!"
    for number, name in enumerate(("cat", "dog", "rabbit")):
        for index in range(number + 2):
            save_image(folder / name / f"{index}.png", (80 * number, index, 0))
    (folder / "dog" / "notes.txt").write_text("no image")
    return folder


def test_class_folders_are_one_task(classes):
    (task,) = read_task_folder(classes, samples=100)
    assert (task.name, task.texts, task.are_class_names) == ("my_pets", ["cat", "dog", "rabbit"], True)
    assert task.answers.tolist() == [0] * 2 + [1] * 3 + [2] * 4
    assert task.choices.tolist() == [[0, 1, 2]] * 9 and task.chance == pytest.approx(1 / 3)
    pixels = task.images.pixels(torch.tensor([8, 0]), 16, torch.device("cpu"))
    assert pixels.shape == (2, 3, 16, 16) and pixels.dtype == torch.uint8
    assert pixels[:, :2, 5, 5].tolist() == [[160, 3], [0, 0]]  # in the order of the indices


def test_samples_bound_a_task_and_are_the_same_each_time(classes):
    first, again = (read_task_folder(classes, samples=5)[0] for _ in range(2))
    assert len(first) == len(first.images) == 5 and first.images.paths == again.images.paths
    assert [path.parent.name for path in first.images.paths] == [first.texts[answer] for answer in first.answers]
    assert len(set(first.images.paths)) == 5


def write_tasks(folder, rows):
    folder.mkdir(exist_ok=True)
    save_image(folder / "a.png", (0, 0, 0))
    (folder / "tasks.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


def row(**changes):
    return {"task": "pets", "image": "a.png", "texts": ["a cat", "a dog"], "answer": 1, **changes}


def test_a_tasks_file_holds_tasks_with_texts_of_their_own(tmp_path):
    other = row(task="count", texts=["one", "two", "three"], answer=0)
    pets, count = read_task_folder(write_tasks(tmp_path / "t", [row(), other, row(texts=["a dog", "x", "y"])]), 10)
    assert (pets.name, pets.texts, pets.are_class_names) == ("pets", ["a cat", "a dog", "x", "y"], False)
    assert pets.choices.tolist() == [[0, 1, NO_TEXT], [1, 2, 3]] and pets.answers.tolist() == [1, 2]
    assert pets.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert (count.name, len(count), count.chance) == ("count", 1, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"Line 1 of '.*tasks.jsonl' is not JSON"),
        (row(task="a b"), 'needs "task", a name of letters'),
        (row(texts=["one"]), "at least two candidates"),
        (row(texts=["one", "one"]), "holds a candidate twice"),
        (row(answer=2), 'needs "answer", a whole number from 0 to 1; got 2'),
        (row(answer=True), 'needs "answer"'),
        (row(image="b.png"), 'needs "image", a file relative to'),
        ([], 'needs "task"'),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    folder = write_tasks(tmp_path / "t", [])
    (folder / "tasks.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(InputError, match=message):
        read_task_folder(folder, 10)


def test_other_folders_are_refused(tmp_path, classes):
    with pytest.raises(InputError, match="is empty"):
        read_task_folder(write_tasks(tmp_path / "t", []), 10)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds 0 folders"):
        read_task_folder(tmp_path / "none", 10)
    (classes / "zebra").mkdir()
    with pytest.raises(InputError, match="holds no image in zebra"):
        read_task_folder(classes, 10)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png"):
        ImageFileList([tmp_path / "bad.png"]).pixels(torch.tensor([0]), 16, torch.device("cpu"))


def test_equal_texts_of_different_samples_are_one():
    task = ZeroShotTask.from_texts("t", ImageFileList([]), [["x", "y"], ["y", "x"]], [0, 0])
    assert task.texts == ["x", "y"] and task.choices.tolist() == [[0, 1], [1, 0]] and task.answers.tolist() == [0, 1]
    assert np.isclose(task.chance, 0.5)
