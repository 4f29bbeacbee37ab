"""Compares an implementation of the whole stem with PyTorch's: `python tests/ops/stem_cases.py DEVICE`.

Run so, Triton interprets its kernels where TRITON_INTERPRET=1; it decides that when it is first imported.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sf_mllm.ops.convolution import convolve
from sf_mllm.ops.kernels import load_kernels
from sf_mllm.ops.pooling import pool_and_normalise
from sf_mllm.ops.stem import apply_stem

Operation = Callable[[Tensor, Tensor, Tensor, str], Tensor]
SIZES = [(2, 7, 10, 40), (1, 19, 18, 64), (2, 22, 37, 64), (3, 1, 1, 64), (1, 2, 3, 64), (3, 33, 90, 40)]
"""Images, their height and width, channels of the result; the last ones take several programs of each kind."""
FUSED = "sf_mllm::apply_stem"


class _Names(TorchDispatchMode):
    """Notes which operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def in_two_steps(pixels: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Tensor:
    return pool_and_normalise(convolve(pixels, weight, bias, implementation), implementation)


def make_inputs(
    size: tuple[int, int, int, int], device: str, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    images, height, width, channels = size
    pixels = torch.randn(images, 3, height, width, generator=generator)
    weight = torch.randn(channels, 3, 7, 7, generator=generator) / 12
    return [tensor.to(device, dtype) for tensor in (pixels, weight, torch.randn(channels, generator=generator))]


def compare(implementation: str, device: str, operation: Operation = apply_stem) -> int:
    """Compare values on every case with PyTorch's in float64; return how many there were."""
    with patch.object(import_module("sf_mllm.ops.stem_triton"), "_FEWEST_PROGRAMS", 0):
        count = _compare(implementation, device, operation)
    _check_that_few_pixels_take_two_steps(implementation, device)
    return count


def _compare(implementation: str, device: str, operation: Operation) -> int:
    generator = torch.Generator().manual_seed(0)
    # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers.
    dtypes = [torch.float16] if device == "cpu" else [torch.float16, torch.bfloat16]
    count = 0
    for size, dtype in product(SIZES, dtypes):
        inputs = make_inputs(size, device, dtype, generator)
        images, height, width, channels = size
        tolerance = {torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        expected = apply_stem(*(tensor.double() for tensor in inputs))
        assert expected.shape == (images, channels, (height + 3) // 4, (width + 3) // 4)
        pixels, weight, bias = inputs
        gaps = pixels.new_full((images, 3, height, 2 * width), torch.nan)[..., ::2].copy_(pixels)
        layouts = [
            inputs,
            [tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs[:2]] + [bias],
            [gaps, weight, bias.repeat_interleave(2)[::2]],
        ]
        for laid_out in layouts:
            torch._dynamo.reset()  # if it is compiled, then for each case anew
            with torch.inference_mode():
                ours = operation(*laid_out, implementation)
            assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)
            scale = expected.abs().max().clamp(min=1)
            note = f"{size}, {dtype}, strides {laid_out[0].stride()}: "
            torch.testing.assert_close(
                ours.double() / scale, expected / scale, atol=tolerance, rtol=tolerance, msg=lambda m, n=note: n + m
            )
        count += 1
    with _Names() as names, torch.inference_mode():
        apply_stem(*inputs, implementation)
    assert FUSED in names.found
    with torch.inference_mode():
        assert operation(inputs[0][:0], *inputs[1:], implementation).shape == (0, *expected.shape[1:])
    _check_autocast(implementation, inputs, operation)
    _check_nan(implementation, inputs, operation)
    _check_what_takes_two_steps(implementation, inputs, operation)
    return count


def _check_autocast(implementation: str, inputs: list[Tensor], operation: Operation) -> None:
    with torch.inference_mode():
        expected = operation(*inputs, implementation)
        with torch.autocast(inputs[0].device.type, inputs[0].dtype):
            assert torch.equal(operation(*(tensor.float() for tensor in inputs), implementation), expected)


def _check_nan(implementation: str, inputs: list[Tensor], operation: Operation) -> None:
    """NaN is where the reference has it, and at most two pixels around that; nothing else changes."""
    pixels = inputs[0].clone()
    for place in ((0, 1, 0, 0), (1, 2, 16, 41), (2, 0, 32, 89)):
        pixels[place] = torch.nan
    with torch.inference_mode():
        without, ours = (operation(given, *inputs[1:], implementation) for given in (inputs[0], pixels))
        expected = apply_stem(pixels, *inputs[1:]).isnan()
    around = torch.nn.functional.max_pool2d(expected.float(), 5, 1, 2).bool()
    assert 0 < expected.sum() < expected.numel() / 10
    assert not (expected & ~ours.isnan()).any() and not (ours.isnan() & ~around).any()
    assert torch.equal(torch.where(ours.isnan(), 0, ours), torch.where(ours.isnan(), 0, without))


def _check_what_takes_two_steps(implementation: str, inputs: list[Tensor], operation: Operation) -> None:
    """What has gradients, is of another type or has other numbers of channels gives exactly what two steps give."""
    some = [inputs[0][:2, :, :9, :14], *inputs[1:]]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        found = []
        for compute in (operation, in_two_steps):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in some]
            result = compute(*leaves, implementation)
            factors = torch.linspace(-1, 1, result.numel(), device=result.device).view(result.shape)
            found.append([result, *torch.autograd.grad((result.float() * factors).sum(), leaves)])
        assert torch.equal(found[0][0], found[1][0])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
    wide = [some[0], *(tensor.repeat_interleave(2, 0) for tensor in some[1:])]
    narrow = [some[0], *(tensor[:32] for tensor in some[1:])]
    single = [tensor.float() for tensor in some]
    for given in (wide, narrow, single):
        torch._dynamo.reset()
        with torch.inference_mode():
            assert torch.equal(operation(*given, implementation), in_two_steps(*given, implementation))
            with _Names() as names:
                apply_stem(*given, implementation)
            assert FUSED not in names.found


def _check_that_few_pixels_take_two_steps(implementation: str, device: str) -> None:
    inputs = make_inputs((1, 9, 14, 64), device, torch.float16, torch.Generator().manual_seed(0))
    with torch.inference_mode(), _Names() as names:
        ours = apply_stem(*inputs, implementation)
        assert torch.equal(ours, in_two_steps(*inputs, implementation))
    assert FUSED not in names.found
    module = import_module("sf_mllm.ops.stem_triton")
    programs = {
        size: module._num_programs(torch.empty(size[0], 3, size[1], size[1], device="meta"))
        for size in ((256, 224), (1, 224), (8, 1792))
    }
    assert programs == {(256, 224): (232, 8), (1, 224): (1, 8), (8, 1792): (57, 64)}


if __name__ == "__main__":
    load_kernels("triton")
    print(f"{compare('triton', sys.argv[1])} cases agree")
    # The operation tells the compiler the truth about shapes and side effects.
    inputs = [
        torch.rand(shape, device=sys.argv[1], dtype=torch.float16) for shape in ((2, 3, 9, 8), (40, 3, 7, 7), (40,))
    ]
    torch.library.opcheck(torch.ops.sf_mllm.apply_stem.default, tuple(inputs))
    traced = torch.compile(apply_stem, backend="aot_eager", fullgraph=True)
    print(f"{compare('triton', sys.argv[1], traced)} traced cases agree")
