import csv

import pytest
import torch

from eval import instruct_speed
from eval.instruct_rows import MixRows
from eval.instruct_speed import FIGURES, main
from sf_mllm.bench.random_models import SIZES, count_visual_tokens, join_sparseformer, make_decoder
from sf_mllm.constants import IGNORE_INDEX

REHEARSAL = ["--size", "tiny", "--steps", "4", "--micro-batch", "4"]


@pytest.fixture(autouse=True)
def one_core():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def read_rows(folder):
    with (folder / "instruct_speed.csv").open() as file:
        return list(csv.DictReader(file))


def test_few_and_many_tokens_an_image_on_the_same_texts(tmp_path):
    work = ["--work", str(tmp_path / "work")]  # made, too
    assert main([*REHEARSAL, "--model", "sparseformer", "patches", "--rows", str(tmp_path), *work]) == 0
    few, many = read_rows(tmp_path)
    assert (few["visual_tokens"], many["visual_tokens"]) == ("4", "36")
    for row in (few, many):
        assert row["outcome"] == "complete" and all(float(row[name]) > 0 for name in FIGURES)
        assert float(row["samples_per_s"]) == pytest.approx(4e3 / float(row["step_ms"]), rel=1e-2)
        assert float(row["tokens_per_s"]) == pytest.approx(
            float(row["samples_per_s"]) * float(row["tokens_per_row"]), rel=1e-2
        )
    # 15 of 16 rows have an image, and no row reaches the maximum.
    difference = float(many["tokens_per_row"]) - float(few["tokens_per_row"])
    assert difference == pytest.approx(32 * 15 / 16, abs=0.1)
    assert few["trained_parameters"] == many["trained_parameters"]


def test_what_does_not_fit_is_a_row(tmp_path, monkeypatch):
    def fill_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(instruct_speed, "train", fill_memory)
    assert main([*REHEARSAL, "--model", "patches", "--rows", str(tmp_path)]) == 0
    (row,) = read_rows(tmp_path)
    assert row["outcome"] == "out of memory" and row["tokens_per_s"] == "" and row["visual_tokens"] == "36"


def test_rows_have_the_mix_and_nothing_is_zero():
    size = SIZES["full"]
    rows = MixRows(2048, size, visual_tokens=64, image_size=32)
    assert sum(rows[row]["pixel_values"] is None for row in range(len(rows))) == 125  # 40,688 of 665,298
    assert 280 < sum(rows.text_lengths) / len(rows) < 320
    assert max(rows.lengths) == 2048
    with_image, text_only = rows[5], rows[2047]
    for index, row in ((5, with_image), (2047, text_only)):
        assert len(row["input_ids"]) == len(row["labels"]) == rows.lengths[index]
    assert (with_image["input_ids"] == 32063).sum() == 64 and (text_only["input_ids"] != 32063).all()
    supervised = with_image["labels"] != IGNORE_INDEX
    assert supervised.sum() == (len(supervised) - 64 + 1) // 2 and not supervised[:64].any()
    assert with_image["pixel_values"].std() == pytest.approx(1, abs=0.1)


def test_full_size_is_the_published_one():
    size = SIZES["full"]
    assert count_visual_tokens(size, "sparseformer") == 64
    assert count_visual_tokens(size, "patches") == 576
    with torch.device("meta"):
        model = join_sparseformer(size, make_decoder(size, torch.device("meta")), torch.device("meta"))
    assert sum(p.numel() for p in model.model.language_model.parameters()) == pytest.approx(6.6e9, rel=0.01)
    assert model.model.vision_tower.initial.rois.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tiny", "--micro-batch", "0"], "--micro-batch 0 are too few"),
        (["--size", "tiny", "--steps", "1"], "--steps 1 and --micro-batch 16 are too few"),
        (["--size", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
