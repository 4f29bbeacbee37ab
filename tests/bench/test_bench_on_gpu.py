"""What only a CUDA device has: events, peaks of memory, TF32, graphs."""

import importlib.util

import pytest
import torch

from sf_mllm.bench.chat import measure_chats
from sf_mllm.bench.choices import CHAT_MODES, MODES, PRECISIONS
from sf_mllm.bench.conditions import Conditions
from sf_mllm.bench.encoder import measure_encoders
from sf_mllm.bench.images import Images
from sf_mllm.bench.precision import computing_in
from sf_mllm.bench.timing import forget_peak, held_bytes, peak_gib, time_call
from sf_mllm.encoder.quantization import QUANTIZATIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
CONDITIONS = Conditions(CUDA, Images(), repeats=5, seconds=5)


def test_time_is_that_of_the_device_and_not_of_asking_it():
    square = torch.randn(8192, 8192, device=CUDA)
    square @ square
    one, four = (
        min(time_call(lambda n=n: [square @ square for _ in range(n)], CUDA) for _ in range(5)) for n in (1, 4)
    )
    assert 3 < four / one < 5


def test_peaks_of_memory():
    forget_peak(CUDA)
    held = held_bytes(CUDA)
    torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    assert peak_gib(CUDA, besides=held) == 0.25
    forget_peak(CUDA)
    assert peak_gib(CUDA, besides=held) == 0


def test_tf32_is_on_only_where_it_is_asked_for():
    square = torch.randn(1024, 1024, device=CUDA)
    results = {}
    for precision in ("float32", "tf32"):
        with computing_in(precision, CUDA):
            results[precision] = square @ square
    assert not torch.equal(results["float32"], results["tf32"])


@pytest.mark.parametrize("is_quantised", [False, True])
def test_every_precision_and_mode(is_quantised):
    precisions = [name for name in PRECISIONS if (name in QUANTIZATIONS) == is_quantised]
    if is_quantised:
        if importlib.util.find_spec("torchao") is None:
            precisions.remove("int8")
        if torch.cuda.get_device_capability(CUDA) < (8, 9):
            precisions.remove("float8")
        if not precisions:
            pytest.skip("needs torchao or a device with float8")
    rows = list(
        measure_encoders(
            ["demo", "demo:clip"], CONDITIONS, sizes=[None], batches=[2], precisions=precisions, modes=list(MODES)
        )
    )
    assert len(rows) == 2 * len(precisions) * len(MODES)
    assert {row.outcome for row in rows} == {"complete"}
    assert all(row.peak_memory_gib > 0 for row in rows)


def test_answers():
    rows = list(
        measure_chats(
            ["demo", "random:llava-tiny"],
            CONDITIONS,
            batches=[2],
            precision="bfloat16",
            modes=list(CHAT_MODES),
            new_tokens=8,
            text_tokens=8,
        )
    )
    assert {row.outcome for row in rows} <= {"complete", "no image processor"}
    assert all(row.peak_memory_gib > 0 for row in rows)
