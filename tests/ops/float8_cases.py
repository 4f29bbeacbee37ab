"""Compares a float8 layer and its activation with float64: `python tests/ops/float8_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sf_mllm.ops.float8 import LARGEST, Float8Layer, multiply_and_activate, quantise
from sf_mllm.ops.kernels import load_kernels

Operation = Callable[..., Tensor]
SIZES = [(1, 16, 16), (130, 144, 272), (300, 256, 96)]
"""Tokens, their width, that of the result: a single row, partial tiles and steps."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


def compare(implementation: str, device: str, operation: Operation = multiply_and_activate) -> int:
    """Compare values on every case with float64; return how many there were."""
    with patch.object(import_module("sf_mllm.ops.linear_activation_triton"), "_FEWEST_TILES", 0):
        return _compare(implementation, device, operation)


def _compare(implementation: str, device: str, operation: Operation) -> int:
    generator = torch.Generator().manual_seed(0)
    count = 0
    for (rows, width, hidden), activation in product(SIZES, ACTIVATIONS):
        inputs, layer, result_scale = make_arguments(rows, width, hidden, generator, device)
        factors = (inputs.double() * layer.input_scale, layer.weight.double() * layer.weight_scale)
        expected = ACT2FN[activation](torch.nn.functional.linear(*factors, layer.bias.double()))
        limit = LARGEST * result_scale.double()
        assert rows == 1 or (expected.abs() > limit).any()  # something is cut off
        expected = expected.clamp(-limit, limit)
        for given in (inputs, inputs[None]):
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            with torch.inference_mode():
                ours = operation(given, layer, activation, result_scale, implementation)
            assert ours.dtype == torch.float8_e4m3fn and ours.shape == (*given.shape[:-1], hidden)
            values = ours.reshape(rows, hidden).double()
            if device == "cpu":  # Triton's interpreter makes 16 of 31.9 instead of 32
                rounded = quantise(expected, result_scale).double()
                values = torch.where(2 * values == rounded, rounded, values)
            # Half a step of e4m3, 2**-4 of a value, or of the smallest one; and what the sums' own rounding adds.
            torch.testing.assert_close(
                values * result_scale,
                expected,
                atol=float(result_scale) * 2**-10 + 2e-3,
                rtol=2**-4 + 2**-8,
                msg=lambda m, n=f"{rows, width, hidden}, {activation}: ": n + m,
            )
        count += 1
    inputs = inputs.clone()
    inputs.view(torch.uint8)[2, 3] = 0x7F  # NaN
    with torch.inference_mode():
        lost = operation(inputs, layer, "gelu", result_scale, implementation).float().isnan()
        # Triton's interpreter has no NaN in float8.
        assert lost[2].all() or device == "cpu"
        assert not lost[:2].any() and not lost[3:].any()
        assert operation(inputs[:0], layer, "gelu", result_scale, implementation).shape == (0, hidden)
        # Another activation, or no bias: what the reference does; compiled it rounds less often in between.
        for some_layer, activation in ((layer, "silu"), (layer._replace(bias=None), "gelu")):
            given = (inputs[3:], some_layer, activation, result_scale)
            ours, own = operation(*given, implementation), multiply_and_activate(*given)
            torch.testing.assert_close(ours.float(), own.float(), atol=2**-9, rtol=2**-3)  # a step of e4m3
    return count


def make_arguments(
    rows: int, width: int, hidden: int, generator: torch.Generator, device: str
) -> tuple[Tensor, Float8Layer, Tensor]:
    """Return tokens, a layer, and the scale of its result."""
    tokens = torch.randn(rows, width, generator=generator)
    weight = torch.randn(hidden, width, generator=generator) / width**0.5
    input_scale, weight_scale = torch.tensor(0.03), weight.abs().max() / LARGEST
    bias = torch.randn(hidden, generator=generator).bfloat16()
    parts = (quantise(weight, weight_scale), bias, input_scale, weight_scale)
    layer = Float8Layer(*(part.to(device) for part in parts))
    return quantise(tokens, input_scale).to(device), layer, torch.tensor(2.0 / LARGEST, device=device)


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes and side effects.
    tokens, layer, result_scale = make_arguments(3, 16, 32, torch.Generator().manual_seed(0), sys.argv[1])
    torch.library.opcheck(
        torch.ops.sf_mllm.float8_linear_activation.default,
        (tokens, layer.weight, layer.bias, [layer.input_scale, layer.weight_scale, result_scale], 0),
        test_utils="test_faketensor",  # the others compare numbers, for which float8 lacks operations
    )
    traced = torch.compile(multiply_and_activate, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced)} traced cases agree")
