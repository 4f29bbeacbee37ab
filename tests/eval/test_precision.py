import csv

import pytest
import torch
from PIL import Image

from eval.precision import main, read_images
from tests.encoder.tiny import tiny_model


@pytest.fixture
def encoder_directory(tmp_path):
    tiny_model().save_pretrained(tmp_path / "encoder")
    from sf_mllm import SparseFormerImageProcessor

    SparseFormerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_every_mode_has_a_row_for_each_output(encoder_directory, tmp_path, capsys):
    assert main(["--model", str(encoder_directory), "--count", "2", "--device", "cpu", "--rows", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    with (tmp_path / "precision.csv").open() as file:
        rows = list(csv.DictReader(file))
    errors = {(row["mode"], row["field"]): float(row["relative_error"]) for row in rows}
    assert len(errors) == 9 and {row["weights"] for row in rows} == {"trained"}
    assert all(0 < error < 0.1 for error in errors.values())
    # fp16 has three more bits than bf16
    assert errors["fp16 autocast", "pooler_output"] < errors["bf16 autocast", "pooler_output"]


def test_images_come_through_the_encoders_own_processor(encoder_directory, tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    Image.new("RGB", (50, 20)).save(tmp_path / "images" / "deep" / "a.png")
    pixels = read_images(tmp_path / "images", 4, str(encoder_directory))
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, pixels[:, :, :1, :1].expand(-1, -1, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sparseformer_v1_tin"], "Did you mean 'sparseformer_v1_tiny'"),
        (["--model", "sparseformer_v1_tiny", "--images", "/nowhere"], "'/nowhere' does not exist"),
        (["--model", "sparseformer_v1_tiny", "--count", "0"], "--count 0"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
