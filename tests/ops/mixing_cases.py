"""Compares an implementation of sampling and mixing with PyTorch's: `python tests/ops/mixing_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from sf_mllm.ops.kernels import load_kernels
from sf_mllm.ops.mixing import sample_and_mix

Mixer = Callable[..., Tensor]
Sizes = list[tuple[int, ...]]
SIZES: Sizes = [(2, 64, 7, 9, 3, 16, 32), (1, 8, 3, 1, 2, 5, 32), (2, 96, 4, 5, 2, 36, 36), (1, 130, 3, 3, 1, 4, 8)]
"""B, C, H, W, N, P, Q: published sizes of both families, an odd one, more channels than kernels hold."""


def gradients(mix: Mixer, inputs: list[Tensor], factors: Tensor, **options: str) -> list[Tensor]:
    """Return the result and the gradients of features, points and parameters."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    mixed = mix(*leaves, **options)
    return [mixed, *torch.autograd.grad((mixed.float() * factors).sum(), leaves)]


def mix_each(features: Tensor, points: Tensor, parameters: Tensor, **options: str) -> Tensor:
    """PyTorch's, with points and parameters for each image, which may be the same ones."""
    batch = len(features)
    return sample_and_mix(features, points.expand(batch, -1, -1, -1), parameters.expand(batch, -1, -1), **options)


def compare(implementation: str, device: str, mix_with: Mixer = sample_and_mix, sizes: Sizes = SIZES) -> int:
    """Compare values and gradients on every case with PyTorch's in higher precision; return how many there were."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float16]
    if device != "cpu":  # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers
        dtypes.append(torch.bfloat16)
    count = 0
    for size, dtype, padding_mode, shared in product(sizes, dtypes, ("border", "zeros"), (True, False)):
        if shared and size[0] == 1:
            continue
        batch, channels, height, width, tokens, points, outputs = size
        features = torch.randn(batch, channels, height, width, generator=generator).to(device, dtype)
        places = (torch.rand(batch, tokens, points, 2, generator=generator) * 2 - 0.5).to(device)  # half outside
        places[:, :, 0] = torch.tensor([1e9, -1e9])
        parameters = torch.randn(batch, tokens, channels**2 + outputs * points, generator=generator)
        parameters = (parameters / channels**0.5).to(device, dtype)
        if shared:  # one image's, for all
            places, parameters = places[:1], parameters[:1]
        factors = torch.randn(batch, tokens, outputs, channels, generator=generator).to(device)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        exact = [features.double(), places, parameters.double()]
        expected = gradients(mix_each, exact, factors, padding_mode=padding_mode)
        for laid_out in (features, features.contiguous(memory_format=torch.channels_last)):
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            options = {"padding_mode": padding_mode, "implementation": implementation}
            ours = gradients(mix_with, [laid_out, places, parameters], factors, **options)
            assert ours[0].dtype == dtype
            for name, a, b in zip(("values", "features", "points", "parameters"), ours, expected, strict=True):
                note = f"{name} of {size}, {dtype}, {padding_mode}, shared: {shared}, strides {laid_out.stride()}: "
                scale = b.abs().max().clamp(min=1)
                torch.testing.assert_close(
                    a.double() / scale, b.double() / scale, atol=tolerance, rtol=tolerance, msg=lambda m, n=note: n + m
                )
        count += 1
    frozen = mix_with(features, places.requires_grad_(), parameters, **options)  # without a gradient of features
    expected_frozen = sample_and_mix(features, places, parameters, padding_mode=padding_mode)
    for a, b in zip(
        *(torch.autograd.grad((mixed.float() * factors).sum(), places) for mixed in (frozen, expected_frozen)),
        strict=True,
    ):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), atol=tolerance, rtol=tolerance)
    empty = mix_with(features[:, :8], places[:, :0], parameters[:, :0, : 64 + outputs * points], **options)
    assert empty.shape == (batch, 0, outputs, 8)
    return count


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes, side effects and gradients.
    shapes = ((2, 4, 5, 6), (2, 3, 4, 2), (2, 3, 16 + 8 * 4))
    inputs = [torch.rand(shape, device=sys.argv[1], requires_grad=True) for shape in shapes]
    torch.library.opcheck(torch.ops.sf_mllm.sample_and_mix.default, (*inputs, True))
    torch.library.opcheck(torch.ops.sf_mllm.sample_and_mix.default, (*inputs[:2], inputs[2][:1], True))
    traced = torch.compile(sample_and_mix, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced, SIZES[:1])} traced cases agree")
