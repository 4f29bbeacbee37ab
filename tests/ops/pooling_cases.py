"""Compares an implementation of the stem's pooling and norm with PyTorch's: `python tests/ops/pooling_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from sf_mllm.ops.kernels import load_kernels
from sf_mllm.ops.pooling import pool_and_normalise

Pool = Callable[[Tensor, str], Tensor]
Sizes = list[tuple[int, int, int, int]]
SIZES: Sizes = [(2, 64, 8, 10), (1, 5, 1, 1), (3, 96, 7, 33), (2, 16, 2, 5), (1, 130, 3, 3)]
"""B, C, H, W: even sizes, a single pixel, odd ones, more channels than kernels hold."""


def gradients(pool: Pool, features: Tensor, factors: Tensor, implementation: str) -> list[Tensor]:
    """Return the result and the gradient of the features."""
    leaf = features.detach().requires_grad_()
    result = pool(leaf, implementation)
    return [result, *torch.autograd.grad((result.float() * factors).sum(), leaf)]


def compare(implementation: str, device: str, pool_with: Pool = pool_and_normalise, sizes: Sizes = SIZES) -> int:
    """Compare values and gradients on every case with PyTorch's in float64; return how many there were."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float16]
    if device != "cpu":  # as in the other comparisons
        dtypes.append(torch.bfloat16)
    count = 0
    for size, dtype in product(sizes, dtypes):
        batch, channels, height, width = size
        features = torch.randn(size, generator=generator).to(device, dtype)
        features[:, 0] = features[:, 0].round()  # many equal ones: the first has the gradient
        features[:, 1 % channels] = -1.0  # nothing positive
        shape = (batch, channels, (height + 1) // 2, (width + 1) // 2)
        factors = torch.randn(shape, generator=generator).to(device)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        expected = gradients(pool_and_normalise, features.double(), factors.to(dtype).double(), "torch")
        gaps = features.new_full((batch, channels, height, 2 * width), torch.nan)[..., ::2].copy_(features)
        for laid_out in (features, features.contiguous(memory_format=torch.channels_last), gaps):
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            ours = gradients(pool_with, laid_out, factors, implementation)
            ours.append(pool_with(laid_out, implementation))  # nothing noted for gradients
            for name, a, b in zip(("values", "gradients", "values alone"), ours, [*expected, expected[0]], strict=True):
                note = f"{name} of {size}, {dtype}, strides {laid_out.stride()}: "
                assert a.dtype == dtype and a.shape == b.shape
                scale = b.abs().max().clamp(min=1)
                torch.testing.assert_close(
                    a.double() / scale, b / scale, atol=tolerance, rtol=tolerance, msg=lambda m, n=note: n + m
                )
        count += 1
    holes = torch.randn(2, 8, 9, 9, generator=generator).to(device)
    holes[0, 3, 4, 5] = holes[1, :, 0, 0] = torch.nan
    with_gradients = pool_with(holes.clone().requires_grad_(), implementation)
    for pooled in (pool_with(holes, implementation), with_gradients):
        assert torch.equal(pooled.isnan(), pool_and_normalise(holes).isnan()) and 0 < pooled.isnan().sum() < 32 + 9
    assert pool_with(features[:0], implementation).shape == (0, *shape[1:])
    return count


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes, side effects and gradients.
    torch.library.opcheck(
        torch.ops.sf_mllm.pool_and_normalise.default,
        (torch.rand(2, 5, 4, 7, device=sys.argv[1], requires_grad=True), True),
    )
    torch.library.opcheck(
        torch.ops.sf_mllm.pool_and_normalise.default, (torch.rand(2, 5, 4, 7, device=sys.argv[1]), False)
    )
    traced = torch.compile(pool_and_normalise, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced, SIZES[:2])} traced cases agree")
