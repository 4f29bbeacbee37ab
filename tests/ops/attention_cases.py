"""Compares an implementation of attention with PyTorch's, on any device: `python tests/ops/attention_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from sf_mllm.ops.attention import attend
from sf_mllm.ops.kernels import load_kernels

Attend = Callable[[Tensor, int, str], Tensor]
SIZES = [(2, 49, 2, 32), (3, 64, 1, 64), (1, 1, 3, 8), (2, 5, 2, 20), (1, 65, 2, 16), (1, 17, 1, 128), (1, 140, 1, 8)]
"""Images, tokens, heads and width of a head: whole blocks, odd ones, a single token, more tokens than kernels hold."""


def gradients(attend: Attend, packed: Tensor, num_heads: int, weights: Tensor, implementation: str) -> list[Tensor]:
    """Return the mixed tokens and the gradient of the projections."""
    projections = packed.detach().requires_grad_()
    mixed = attend(projections, num_heads, implementation)
    return [mixed, *torch.autograd.grad((mixed.float() * weights).sum(), projections)]


def compare(implementation: str, device: str, attend_with: Attend = attend) -> int:
    """Compare values and gradients on every case with PyTorch's in float64; return how many there were."""
    dtypes = [torch.float32, torch.float16]
    if device != "cpu":  # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers
        dtypes.append(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    count = 0
    for (images, tokens, heads, width), dtype in product(SIZES, dtypes):
        packed = (2 * torch.randn(images, tokens, 3 * heads * width, generator=generator)).to(device, dtype)
        weights = torch.randn(images, tokens, heads * width, generator=generator).to(device)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        expected = gradients(attend, packed.double(), heads, weights, "torch")
        torch._dynamo.reset()  # if it is compiled, then for each case anew
        with_gaps = packed.new_full((images, tokens, 6 * heads * width), torch.nan)[..., ::2].copy_(packed)
        for projections in (packed, with_gaps):
            ours = gradients(attend_with, projections, heads, weights, implementation)
            for name, a, b in zip(("values", "gradients"), ours, expected, strict=True):
                note = f"{name} of {images, tokens, heads, width}, {dtype}, strides {projections.stride()}: "
                assert a.dtype == dtype and a.shape == b.shape
                scale = b.abs().max().clamp(min=1)
                torch.testing.assert_close(
                    a.double() / scale, b / scale, atol=tolerance, rtol=tolerance, msg=lambda m, n=note: n + m
                )
        count += 1
    empty = attend_with(packed[:0, :5], heads, implementation)
    assert empty.shape == (0, 5, heads * width)
    return count


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes, side effects and gradients.
    packed = torch.rand(2, 5, 24, device=sys.argv[1], requires_grad=True)
    torch.library.opcheck(torch.ops.sf_mllm.attend.default, (packed, 2))
    traced = torch.compile(attend, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced)} traced cases agree")
