"""Compares a sampling implementation with PyTorch's, on any device: `python tests/ops/sampling_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from sf_mllm.ops.kernels import load_kernels
from sf_mllm.ops.sampling import sample_points

Sampler = Callable[..., Tensor]
Sizes = list[tuple[int, int, int, int]]
SIZES: Sizes = [(2, 5, 7, 9), (1, 64, 1, 4), (2, 130, 3, 3), (1, 1, 12, 2)]
"""Feature maps [B, C, H, W]: odd, one row, more channels than a kernel takes at once, one channel."""


def lay_out(feature_map: Tensor) -> Iterator[Tensor]:
    """Yield the same features as they may lie in memory: channels first, channels last, with gaps."""
    yield feature_map.contiguous()
    yield feature_map.contiguous(memory_format=torch.channels_last)
    with_gaps = feature_map.new_full([2 * side for side in feature_map.shape], torch.nan)[::2, ::2, ::2, ::2]
    yield with_gaps.copy_(feature_map)


def gradients(sample: Sampler, features: Tensor, points: Tensor, weights: Tensor, **options: str) -> list[Tensor]:
    """Return what is sampled and the gradients of features and points."""
    inputs = (features.detach().requires_grad_(), points.detach().requires_grad_())
    sampled = sample(*inputs, **options)
    return [sampled, *torch.autograd.grad((sampled * weights).sum(), inputs)]


def compare(implementation: str, device: str, sample: Sampler = sample_points, sizes: Sizes = SIZES) -> int:
    """Compare values and gradients on every case; return how many there were."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for size, dtype, padding_mode in product(
        sizes, (torch.float32, torch.bfloat16, torch.float16), ("border", "zeros")
    ):
        feature_map = torch.randn(size, generator=generator).to(device, dtype)
        points = (torch.rand(size[0], 3, 7, 2, generator=generator) * 3 - 1).to(device)  # two thirds outside
        points[:, :, 0] = torch.tensor([1e9, -1e9])
        weights = torch.randn(size[0], 3, 7, size[1], generator=generator).to(device, dtype)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
        for features in lay_out(feature_map):
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            arguments = (features, points, weights)
            ours = gradients(sample, *arguments, padding_mode=padding_mode, implementation=implementation)
            theirs = gradients(sample_points, *arguments, padding_mode=padding_mode)
            for name, a, b in zip(("values", "features", "points"), ours, theirs, strict=True):
                note = f"{name} of {size}, {dtype}, {padding_mode}, strides {features.stride()}"
                # Gradients of points are sums over channels times the size of the map.
                scale = 1.0 if name != "points" else float(b.abs().max().clamp(min=1))
                torch.testing.assert_close(
                    a / scale, b / scale, atol=tolerance, rtol=tolerance, msg=lambda m, n=note: n + m
                )
            count += 1
    without_gradient = sample(
        feature_map, points.requires_grad_(), padding_mode="border", implementation=implementation
    )
    expected = sample_points(feature_map, points, padding_mode="border")
    for a, b in zip(
        *(torch.autograd.grad((x * weights).sum(), points) for x in (without_gradient, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=0.5, rtol=2e-2)
    lost = torch.full_like(points[:, :, :1], torch.nan)
    assert sample(feature_map, lost, padding_mode="zeros", implementation=implementation).isnan().all()
    empty = sample(feature_map, points[:, :0], padding_mode="zeros", implementation=implementation)
    assert empty.shape == (size[0], 0, 7, size[1])
    return count


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes, side effects and gradients.
    inputs = [torch.rand(shape, device=sys.argv[1], requires_grad=True) for shape in ((2, 4, 5, 6), (2, 3, 4, 2))]
    torch.library.opcheck(torch.ops.sf_mllm.sample_points.default, (*inputs, True))
    traced = torch.compile(sample_points, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced, SIZES[:1])} traced cases agree")
