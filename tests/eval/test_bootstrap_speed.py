import csv

import pytest
import torch

from eval import bootstrap_speed
from eval.bootstrap_speed import FIGURES, KeptInMemory, main

REHEARSAL = ["--size", "tiny", "--no-compile", "--steps", "4", "--global-batch", "2", "--files", "8"]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(bootstrap_speed, "count_cores", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_teacher_online_and_from_a_store(tmp_path):
    arguments = ["--micro-batch", "1", "--images", "memory", "files", "--file-size", "64", "--rows", str(tmp_path)]
    assert main([*REHEARSAL, *arguments, "--work", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "bootstrap_speed.csv")
    assert [(row["teacher"], row["images"]) for row in rows] == [
        ("online", "memory"),
        ("online", "8 JPEG files of 64 px"),
        ("store", "memory"),
        ("store", "8 JPEG files of 64 px"),
    ]
    for row in rows:
        assert row["outcome"] == "complete"
        assert float(row["hours_20_epochs"]) == pytest.approx(25.6e6 / float(row["images_per_s"]) / 3600, rel=1e-2)
        assert float(row["images_per_s"]) == pytest.approx(2e3 / float(row["step_ms"]), rel=1e-2)
        assert sum(float(row[name]) for name in FIGURES if name.endswith("_share")) == pytest.approx(1, abs=1e-3)
    assert {row["sampling"] for row in rows} == {"torch"}
    online, store = float(rows[0]["teacher_share"]), float(rows[2]["teacher_share"])
    assert online > 0.1 and online > 3 * store, "if the store's runs asked the teacher, the shares would be alike"


def test_what_does_not_fit_is_a_row(tmp_path, monkeypatch):
    def fill_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bootstrap_speed, "train", fill_memory)
    arguments = ["--micro-batch", "2", "--teacher", "online", "--images", "memory", "--file-size", "32"]
    assert main([*REHEARSAL, *arguments, "--rows", str(tmp_path)]) == 0
    (row,) = read_rows(tmp_path / "bootstrap_speed.csv")
    assert row["outcome"] == "out of memory" and row["images_per_s"] == "" and row["micro_batch"] == "2"


def test_samples_in_memory_come_again_and_again():
    class Dataset:
        step_size = 7
        made = 0

        def __len__(self):
            return 5

        def __getitem__(self, position):
            self.made += 1
            return {"number": position}

    kept = KeptInMemory(Dataset(), count=2)
    assert [kept[position]["number"] for position in range(len(kept))] == [0, 1, 0, 1, 0]
    assert kept.made == 2 and kept.step_size == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tiny", "--micro-batch", "100"], "--micro-batch 100 must divide --global-batch 512"),
        (["--size", "tiny", "--micro-batch", "0"], "--micro-batch 0 must divide"),
        (["--size", "tiny", "--steps", "3"], "--steps 3 is too few"),
        (["--size", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
