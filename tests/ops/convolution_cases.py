"""Compares an implementation of the stem's convolution with PyTorch's: `python tests/ops/convolution_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from sf_mllm.ops.convolution import convolve
from sf_mllm.ops.kernels import load_kernels

Convolve = Callable[[Tensor, Tensor, Tensor, str], Tensor]
SIZES = [(2, 16, 18, 64), (1, 1, 1, 5), (3, 7, 33, 96), (2, 20, 5, 16)]
"""Images, their height and width, channels of the result: even, a single pixel, odd, fewer channels than a block."""


def gradients(convolve: Convolve, inputs: list[Tensor], factors: Tensor, implementation: str) -> list[Tensor]:
    """Return the result and the gradients of pixels, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the way back is PyTorch's, which would round
        result = convolve(*leaves, implementation)
        return [result, *torch.autograd.grad((result.float() * factors).sum(), leaves)]


def compare(implementation: str, device: str, convolve_with: Convolve = convolve) -> int:
    """Compare values and gradients on every case with PyTorch's in float64; return how many there were."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float16]
    if device != "cpu":  # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers
        dtypes.append(torch.bfloat16)
    count = 0
    for (images, height, width, channels), dtype in product(SIZES, dtypes):
        pixels = torch.randn(images, 3, height, width, generator=generator)
        weight = torch.randn(channels, 3, 7, 7, generator=generator) / 12
        bias = torch.randn(channels, generator=generator)
        inputs = [tensor.to(device, dtype) for tensor in (pixels, weight, bias)]
        shape = (images, channels, (height + 1) // 2, (width + 1) // 2)
        factors = torch.randn(shape, generator=generator).to(device)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        expected = gradients(convolve, [tensor.double() for tensor in inputs], factors.to(dtype).double(), "torch")
        gaps = inputs[0].new_full((images, 3, height, 2 * width), torch.nan)[..., ::2].copy_(inputs[0])
        for laid_out in (inputs[0], inputs[0].contiguous(memory_format=torch.channels_last), gaps):
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            ours = gradients(convolve_with, [laid_out, *inputs[1:]], factors, implementation)
            assert ours[0].dtype == dtype and ours[0].is_contiguous(memory_format=torch.channels_last)
            for name, a, b in zip(("values", "pixels", "weight", "bias"), ours, expected, strict=True):
                note = f"{name} of {images, height, width, channels}, {dtype}, strides {laid_out.stride()}: "
                scale = b.abs().max().clamp(min=1)
                torch.testing.assert_close(
                    a.double() / scale, b / scale, atol=tolerance, rtol=tolerance, msg=lambda m, n=note: n + m
                )
        count += 1
    with torch.autocast(torch.device(device).type, torch.float16):
        assert convolve_with(*(tensor.float() for tensor in inputs), implementation).dtype == torch.float16
    empty = convolve_with(inputs[0][:0], *inputs[1:], implementation)
    assert empty.shape == (0, *shape[1:])
    return count


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes, side effects and gradients.
    inputs = [torch.rand(shape, device=sys.argv[1], requires_grad=True) for shape in ((2, 3, 9, 8), (5, 3, 7, 7), (5,))]
    torch.library.opcheck(torch.ops.sf_mllm.convolve.default, tuple(inputs))
    traced = torch.compile(convolve, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced)} traced cases agree")
