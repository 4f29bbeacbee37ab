"""Compares a linear layer and its activation with PyTorch's: `python tests/ops/linear_activation_cases.py DEVICE`.

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

from sf_mllm.ops.kernels import load_kernels
from sf_mllm.ops.linear_activation import linear_activation

Operation = Callable[[Tensor, Tensor, Tensor, str, str], Tensor]
SIZES = [(1, 8, 8), (130, 72, 264), (300, 128, 96), (1100, 64, 520)]
"""Tokens, their width, that of the result: a single row, partial tiles and steps, several rows of tiles in a group."""
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


def compare(implementation: str, device: str, operation: Operation = linear_activation) -> int:
    """Compare values on every case with PyTorch's in float64; return how many there were."""
    with patch.object(import_module("sf_mllm.ops.linear_activation_triton"), "_FEWEST_TILES", 0):
        return _compare(implementation, device, operation)


def _compare(implementation: str, device: str, operation: Operation) -> int:
    generator = torch.Generator().manual_seed(0)
    # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers.
    dtypes = [torch.float16] if device == "cpu" else [torch.float16, torch.bfloat16]
    count = 0
    for (rows, width, hidden), activation, dtype in product(SIZES, ACTIVATIONS, dtypes):
        tokens = 3 * torch.randn(rows, width, generator=generator)
        weight = torch.randn(hidden, width, generator=generator) / width**0.5
        inputs = [tensor.to(device, dtype) for tensor in (tokens, weight, torch.randn(hidden, generator=generator))]
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        exact = [tensor.double() for tensor in inputs]
        expected = ACT2FN[activation](torch.nn.functional.linear(*exact))
        gaps = inputs[0].new_full((rows, 2 * width), torch.nan)[:, ::2].copy_(inputs[0])
        for laid_out in (inputs[0], gaps, inputs[0][None]):
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            with torch.inference_mode():
                ours = operation(laid_out, *inputs[1:], activation, implementation)
            assert ours.dtype == dtype and ours.shape == (*laid_out.shape[:-1], hidden) and ours.is_contiguous()
            torch.testing.assert_close(
                ours.reshape(rows, hidden).double(),
                expected,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, n=f"{rows, width, hidden}, {activation}, {dtype}: ": n + m,
            )
        count += 1
    with torch.inference_mode():
        assert operation(inputs[0][:0], *inputs[1:], activation, implementation).shape == (0, hidden)
    _check_what_goes_to_the_reference(implementation, inputs, operation)
    return count


def _check_what_goes_to_the_reference(implementation: str, inputs: list[Tensor], operation: Operation) -> None:
    """What has gradients, is of another type or size, or has another activation, gives exactly what PyTorch does."""
    trained = [tensor.detach().requires_grad_() for tensor in inputs]
    operation(*trained, "gelu", implementation).float().sum().backward()
    gradients = [tensor.grad for tensor in trained]
    own = [tensor.detach().requires_grad_() for tensor in inputs]
    linear_activation(*own, "gelu").float().sum().backward()
    for gradient, tensor in zip(gradients, own, strict=True):
        torch.testing.assert_close(gradient, tensor.grad)
    singles = [tensor.float() for tensor in inputs]
    odd = [inputs[0][:, :7], inputs[1][:5, :7], inputs[2][:5]]
    for some, activation in ((singles, "gelu"), (odd, "gelu"), (inputs, "silu")):
        with torch.inference_mode():
            torch.testing.assert_close(
                operation(*some, activation, implementation), linear_activation(*some, activation)
            )
    with torch.autocast(inputs[0].device.type, torch.bfloat16), torch.inference_mode():
        assert operation(*singles, "gelu", implementation).dtype == torch.bfloat16


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes and side effects.
    inputs = [torch.rand(shape, device=sys.argv[1], dtype=torch.float16) for shape in ((2, 3, 8), (16, 8), (16,))]
    torch.library.opcheck(torch.ops.sf_mllm.linear_activation.default, (*inputs, 0))
    traced = torch.compile(linear_activation, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced)} traced cases agree")
