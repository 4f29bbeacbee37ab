import csv

import pytest
import torch

from eval.profile_encoder import PRODUCTS, work_of
from eval.sustained_rate import linear_sizes, main, make_products
from tests.eval.test_profile_encoder import SMALL


def test_the_products_are_those_of_a_call() -> None:
    sizes = linear_sizes(SMALL, 2, (64, 96))
    operations = sum(2 * rows * inputs * outputs for rows, inputs, outputs, _ in sizes)
    assert operations == work_of(SMALL, 2, (64, 96))[PRODUCTS].operations
    assert sum(outputs == 3 * SMALL.hidden_size for _, _, outputs, _ in sizes) >= SMALL.num_hidden_layers


def test_products_have_the_sizes_that_were_asked_for() -> None:
    sizes = [(6, 4, 8, True), (5, 8, 2, False), (6, 4, 8, True)]
    product = make_products(sizes, torch.device("cpu"), torch.float32)()
    assert product.shape == (6, 8) and product.std() > 0.1
    assert make_products(sizes[:2], torch.device("cpu"))().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calls", "0"], "--calls must be at least 1"),
        pytest.param(
            [],
            "needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(capsys, arguments, message) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rates_on_a_gpu(tmp_path) -> None:
    assert main(["--size", "base", "--batch", "2", "--kernels", "torch", "--calls", "2", "--rows", str(tmp_path)]) == 0
    with (tmp_path / "sustained_rate.csv").open(newline="") as file:
        rows = {row["work"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"encoder", "products"}
    assert float(rows["encoder"]["median_ms"]) > float(rows["products"]["median_ms"]) > 0
    assert all(float(row["clock_mhz"]) > 100 and float(row["power_w"]) > 10 for row in rows.values())
