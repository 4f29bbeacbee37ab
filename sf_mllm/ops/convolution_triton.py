"""The stem's convolution by a Triton kernel; made known by being imported.

Libraries are slow for three channels: they fill them up to eight or copy the image. The kernel gathers the 147 inputs
of each output, wherever they lie in memory, and multiplies them by the weight on the matrix units, in sums of fp32. The
way back is PyTorch's own.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sf_mllm.ops.convolution import CONVOLUTION_IMPLEMENTATIONS, PADDING, STRIDE
from sf_mllm.ops.kernels import require_cuda

_BLOCK_PIXELS = 128
_CHANNELS, _SIDE = 3, 7  # of the weight
_BLOCK_TAPS = 32
_NUM_BLOCKS = triton.cdiv(_CHANNELS * _SIDE**2, _BLOCK_TAPS)
_SMALLEST_BLOCK = 16  # of a matrix product


@triton.jit
def _convolve_kernel(
    pixels, weight, bias, result,
    num_results, height, width, result_height, result_width,
    stride_image, stride_channel, stride_row, stride_column,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK_TAPS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    is_result = index < num_results
    image = index // (result_height * result_width)
    place = (index - image * result_height * result_width).to(tl.int32)
    top = 2 * (place // result_width) - 3
    left = 2 * (place % result_width) - 3
    channel = tl.arange(0, BLOCK_CHANNELS)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype=tl.float32)
    for block in tl.static_range(NUM_BLOCKS):
        tap = block * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)  # row, column, channel of the weight, the last one fastest
        row = top[:, None] + (tap // 21)[None, :]
        column = left[:, None] + (tap % 21 // 3)[None, :]
        exists = (
            is_result[:, None] & (tap < 147)[None, :] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        )
        offset = row * stride_row + column * stride_column + (tap % 3)[None, :] * stride_channel
        values = tl.load(pixels + (image * stride_image)[:, None] + offset, mask=exists, other=0.0)
        taps = tl.load(weight + tap[:, None] * BLOCK_CHANNELS + channel[None, :])
        total = tl.dot(values, taps, total, input_precision="ieee")
    total += tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    tl.store(
        result + index[:, None] * CHANNELS + channel[None, :],
        total.to(result.dtype.element_ty),
        mask=is_result[:, None] & (channel < CHANNELS)[None, :],
    )


_IS_INTERPRETED = not isinstance(_convolve_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::convolve", mutates_args=())
def _convolve(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, 3, H, W], [C, 3, 7, 7] and [C], of one dtype -> [B, C, ceil(H/2), ceil(W/2)], channels last."""
    result = _empty_result(pixel_values, weight)
    batch_size, channels, result_height, result_width = result.shape
    if result.numel():
        block_channels = max(_SMALLEST_BLOCK, triton.next_power_of_2(channels))
        num_taps = _CHANNELS * _SIDE**2
        taps = weight.permute(2, 3, 1, 0).reshape(num_taps, channels)
        taps = F.pad(taps, (0, block_channels - channels, 0, _NUM_BLOCKS * _BLOCK_TAPS - num_taps)).contiguous()
        num_results = batch_size * result_height * result_width
        _convolve_kernel[(triton.cdiv(num_results, _BLOCK_PIXELS),)](
            pixel_values, taps, bias.contiguous(), result,
            num_results, *pixel_values.shape[2:], result_height, result_width, *pixel_values.stride(),
            CHANNELS=channels, BLOCK_CHANNELS=block_channels, BLOCK_PIXELS=_BLOCK_PIXELS,
            NUM_BLOCKS=_NUM_BLOCKS, BLOCK_TAPS=_BLOCK_TAPS,
        )  # fmt: skip
    return result


@_convolve.register_fake
def _(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty_result(pixel_values, weight)


def _empty_result(pixel_values: Tensor, weight: Tensor) -> Tensor:
    batch_size, _, height, width = pixel_values.shape
    size = (batch_size, weight.shape[0], (height - 1) // STRIDE + 1, (width - 1) // STRIDE + 1)
    return torch.empty(size, dtype=pixel_values.dtype, device=pixel_values.device, memory_format=torch.channels_last)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    pixel_values, weight, _bias = inputs
    ctx.save_for_backward(pixel_values, weight)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    pixel_values, weight = ctx.saved_tensors
    return torch.ops.aten.convolution_backward(
        grad, pixel_values, weight, [weight.shape[0]],
        [STRIDE, STRIDE], [PADDING, PADDING], [1, 1], False, [0, 0], 1, list(ctx.needs_input_grad),
    )  # fmt: skip


_convolve.register_autograd(_differentiate, setup_context=_remember)


def _convolve_by_triton(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    require_cuda(pixel_values, is_interpreted=_IS_INTERPRETED)
    if torch.is_autocast_enabled(pixel_values.device.type):
        dtype = torch.get_autocast_dtype(pixel_values.device.type)
        pixel_values, weight, bias = pixel_values.to(dtype), weight.to(dtype), bias.to(dtype)
    return _convolve(pixel_values, weight, bias)


CONVOLUTION_IMPLEMENTATIONS["triton"] = _convolve_by_triton
