"""Coordinates are predicted in fp32, whatever the model's precision is."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sf_mllm.encoder.sampler import predict_in_fp32

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HALVES = (torch.bfloat16, torch.float16)


class Operations(TorchDispatchMode):
    """Notes what is asked of the device."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "with_gradients", "exact"),
    [
        *((dtype, dtype, False, True) for dtype in HALVES),
        (torch.bfloat16, torch.bfloat16, True, False),
        (torch.bfloat16, torch.float32, False, False),
        (torch.float32, torch.float32, False, False),
    ],
)
def test_matrix_units_multiply_16_bits_where_nothing_trains(dtype, weight_dtype, with_gradients, exact):
    """On a pretended CUDA device."""
    with FakeTensorMode(), Operations() as operations:
        tokens = torch.empty(2, 5, 16, device="cuda", dtype=dtype)
        weight = torch.empty(4, 16, device="cuda", dtype=weight_dtype, requires_grad=with_gradients)
        result = predict_in_fp32(tokens, weight)
    assert result.shape == (2, 5, 4) and result.dtype == torch.float32
    assert ("aten.mm.dtype" in operations.names) == exact
    assert not exact or not any("_to_copy" in name for name in operations.names)


@pytest.mark.parametrize("dtype", HALVES)
def test_no_prediction_is_rounded_to_16_bits(dtype):
    tokens = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = predict_in_fp32(tokens, weight)
    torch.testing.assert_close(result.double(), tokens.double() @ weight.double().T, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outputs", [4, 72])
@pytest.mark.parametrize("compiled", [False, True])
def test_matrix_units_sum_in_fp32_on_a_gpu(dtype, outputs, compiled):
    tokens, weight = torch.randn(2, 49, 768, device="cuda"), torch.randn(outputs, 768, device="cuda") / 28
    tokens, weight = tokens.to(dtype), weight.to(dtype)
    expected = tokens.double() @ weight.double().T
    torch._dynamo.reset()
    predict = torch.compile(predict_in_fp32, fullgraph=True) if compiled else predict_in_fp32
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        result = predict(tokens, weight)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=2e-5)
