"""The whole stem by two Triton kernels, for many pixels in 16 bits; made known by being imported.

In two steps the convolution's result, the largest tensor of the encoder, goes to memory and comes back. Here it stays
on the chip. The first kernel copies the images, channels last and with a border of zeros, after which the inputs of an
output lie in seven pieces, one a row, instead of 147.

The second kernel convolves pairs of neighbouring columns. The 21 inputs that each needs of a row are 27 for both; a
product has 32, and weights that are zero where an input is the other column's. A pooled pixel is the largest of its own
pair and of the second column of the pair to its left. A program takes as many pairs as a product of the matrix units
has rows and goes down some rows of the image; the last row of the convolution is kept for the next one of the result.

Beside the two steps the convolution's result is rounded to 16 bits before its bias is added, and what is not finite
among the pixels may spread as NaN to a few neighbours more, since weights of zero are multiplied by it. There is no way
back: what trains goes to the two steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sf_mllm.ops.convolution import PADDING, STRIDE, convolve
from sf_mllm.ops.kernels import require_cuda
from sf_mllm.ops.pooling import POOL_EPS, POOL_PADDING, POOL_STRIDE, POOL_WINDOW, pool_and_normalise
from sf_mllm.ops.stem import STEM_IMPLEMENTATIONS

_FEWEST_PROGRAMS = 528
"""Four for each multiprocessor of an H200. It paid with 1,856 and more; with 8 it took longer than two steps."""
_BLOCK_CHANNELS = 64
"""Channels are filled up to so many. It did not pay with 96, and if half of them were filled up it would pay less."""
_BLOCK_PAIRS = 64  # of columns, that a program works on; the first one only for the pair to its right
_ROWS = 7  # of the result, that a program works on
_BLOCK_GROUPS = 128  # of four pixels, that a program copies
_CHANNELS, _SIDE = 3, 7  # of the weight
_PIXELS = 4  # of a group; results lie as far apart
_BORDER_ROWS, _BORDER_GROUPS = 6, 3  # of the copied images, both sides together
_TAPS = 32  # of a row of the weight for a pair of columns, filled up with zeros


@triton.jit
def _larger(a, b):
    """The larger one, NaN if one is NaN."""
    # For bfloat16 tl.maximum goes through float32 and back where the compiler cannot see that it need not; this does
    # not. Triton's interpreter knows no instructions of a device, but it is not given bfloat16.
    if a.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _join_four(a, b, c, d):
    """[N] each -> [N, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def _split_four(values):
    """[N, 4] -> [N] each."""
    even, odd = tl.split(tl.reshape(values, [values.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _repack_kernel(
    pixels, repacked, num_groups, height, width, padded_height, padded_groups,
    stride_image, stride_channel, stride_row, stride_column,
    BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    line = index // padded_groups
    image = line // padded_height
    row = line - image * padded_height - 3
    column = 4 * (index - line * padded_groups)[:, None] - 8 + tl.arange(0, 4)[None, :]
    is_group = index < num_groups
    exists = (is_group & (row >= 0) & (row < height))[:, None] & (column >= 0) & (column < width)
    start = pixels + (image.to(tl.int64) * stride_image + row * stride_row)[:, None] + column * stride_column
    red_0, red_1, red_2, red_3 = _split_four(tl.load(start, mask=exists, other=0.0))
    green_0, green_1, green_2, green_3 = _split_four(tl.load(start + stride_channel, mask=exists, other=0.0))
    blue_0, blue_1, blue_2, blue_3 = _split_four(tl.load(start + 2 * stride_channel, mask=exists, other=0.0))
    where = repacked + index.to(tl.int64)[:, None] * 12 + tl.arange(0, 4)[None, :]
    mask = is_group[:, None]
    tl.store(where, _join_four(red_0, green_0, blue_0, red_1), mask=mask)
    tl.store(where + 4, _join_four(green_1, blue_1, red_2, green_2), mask=mask)
    tl.store(where + 8, _join_four(blue_2, red_3, green_3, blue_3), mask=mask)


@triton.jit
def _pool_columns(best, bias, pair, convolved_width, BLOCK_CHANNELS: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """[BLOCK_PAIRS, 2 * BLOCK_CHANNELS], the largest of three rows -> the largest of three columns, positive, fp32."""
    first, second = tl.split(tl.reshape(best, [BLOCK_PAIRS, BLOCK_CHANNELS, 2]))
    has_second = (pair > 0) & (2 * pair - 1 < convolved_width)
    second = tl.where(has_second[:, None], second, float("-inf")).to(best.dtype)
    left = tl.maximum(tl.arange(0, BLOCK_PAIRS) - 1, 0)
    left_second = tl.gather(second, tl.broadcast_to(left[:, None], [BLOCK_PAIRS, BLOCK_CHANNELS]), 0)
    return _larger(_larger(_larger(first, second), left_second).to(tl.float32) + bias, 0.0)


@triton.jit
def _normalise(values, is_channel, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    mean = tl.sum(values, axis=1) / CHANNELS
    centred = tl.where(is_channel, values - mean[:, None], 0.0)
    return centred / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + EPS)[:, None]


# Whatever the sizes are, the code is the same; it would be compiled again for those that 16 divides, and for 1.
@triton.jit(
    do_not_specialize=[
        *("num_pairs", "padded_height", "padded_groups"),
        *("result_height", "result_width", "convolved_height", "convolved_width"),
    ]
)
def _stem_kernel(
    repacked, weight, bias, result,
    num_pairs, padded_height, padded_groups, result_height, result_width, convolved_height, convolved_width,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    # Each image has result_width + 1 pairs, the first of which lies outside; blocks of pairs overlap by one, which
    # gives its second column to the pair to its right.
    lane = tl.arange(0, BLOCK_PAIRS)
    index = tl.program_id(0) * (BLOCK_PAIRS - 1) + lane
    channel = tl.arange(0, BLOCK_CHANNELS)
    is_channel = (channel < CHANNELS)[None, :]
    safe_index = tl.minimum(index, num_pairs - 1)
    image = safe_index // (result_width + 1)
    pair = safe_index - image * (result_width + 1)
    line = padded_groups * 12
    # A product has a depth of two rows of the image.
    tap = tl.arange(0, 64)
    start = repacked + (image.to(tl.int64) * padded_height * line + pair * 12)[:, None]
    start += ((tap // 32) * line + tap % 32)[None, :]
    taps = weight + tap[:, None] * (2 * BLOCK_CHANNELS) + tl.arange(0, 2 * BLOCK_CHANNELS)[None, :]
    weight_0 = tl.load(taps)
    weight_1 = tl.load(taps + 64 * 2 * BLOCK_CHANNELS)
    weight_2 = tl.load(taps + 128 * 2 * BLOCK_CHANNELS)
    weight_3 = tl.load(taps + 192 * 2 * BLOCK_CHANNELS)
    bias_row = tl.load(bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    mask = ((lane > 0) & (pair > 0) & (index < num_pairs))[:, None] & is_channel
    place = image.to(tl.int64) * (result_height * result_width) + pair - 1
    where = result + (place * CHANNELS)[:, None] + channel[None, :]

    # The row above the first one of the result; at the top, where there is none, the first row itself, to no effect.
    first_row = tl.program_id(1) * ROWS
    above = start + 2 * tl.maximum(2 * first_row - 1, 0) * line
    odd = tl.dot(tl.load(above), weight_0)
    odd = tl.dot(tl.load(above + 2 * line), weight_1, odd)
    odd = tl.dot(tl.load(above + 4 * line), weight_2, odd)
    odd = tl.dot(tl.load(above + 6 * line), weight_3, odd)
    carry = odd.to(repacked.dtype.element_ty)
    # It was fastest without loads that run ahead of the products.
    for row in tl.range(first_row, tl.minimum(first_row + ROWS, result_height), num_stages=1):
        # Two rows of the convolution, from five loads: the odd one begins two rows of the image further down.
        here = start + (4 * row) * line
        even = tl.dot(tl.load(here), weight_0)
        values = tl.load(here + 2 * line)
        even = tl.dot(values, weight_1, even)
        odd = tl.dot(values, weight_0)
        values = tl.load(here + 4 * line)
        even = tl.dot(values, weight_2, even)
        odd = tl.dot(values, weight_1, odd)
        values = tl.load(here + 6 * line)
        even = tl.dot(values, weight_3, even)
        odd = tl.dot(values, weight_2, odd)
        odd = tl.dot(tl.load(here + 8 * line), weight_3, odd)
        best = _larger(carry, even.to(repacked.dtype.element_ty))
        carry = tl.where(2 * row + 1 < convolved_height, odd, float("-inf")).to(repacked.dtype.element_ty)
        pooled = _pool_columns(_larger(best, carry), bias_row, pair, convolved_width, BLOCK_CHANNELS, BLOCK_PAIRS)
        normalised = _normalise(pooled, is_channel, CHANNELS, EPS)
        tl.store(where + row * (result_width * CHANNELS), normalised.to(result.dtype.element_ty), mask=mask)


_IS_INTERPRETED = not isinstance(_stem_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::apply_stem", mutates_args=())
def _apply_stem(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, 3, H, W], [C, 3, 7, 7] and [C], of one dtype -> [B, C, ceil(H/4), ceil(W/4)], channels last."""
    result = _empty_result(pixel_values, weight)
    if result.numel():
        batch_size, channels, result_height, result_width = result.shape
        height, width = pixel_values.shape[2:]
        repacked = _repack(pixel_values, result_height, result_width)
        _stem_kernel[_num_programs(pixel_values)](
            repacked, _arrange(weight), bias.contiguous(), result,
            batch_size * (result_width + 1), *repacked.shape[1:3], result_height, result_width,
            _divide(height, STRIDE), _divide(width, STRIDE),
            CHANNELS=channels, BLOCK_CHANNELS=_BLOCK_CHANNELS, BLOCK_PAIRS=_BLOCK_PAIRS, ROWS=_ROWS, EPS=POOL_EPS,
            num_warps=4,
        )  # fmt: skip
    return result


@_apply_stem.register_fake
def _(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty_result(pixel_values, weight)


def _empty_result(pixel_values: Tensor, weight: Tensor) -> Tensor:
    batch_size, _, height, width = pixel_values.shape
    size = (batch_size, weight.shape[0], _divide(height, _PIXELS), _divide(width, _PIXELS))
    return torch.empty(size, dtype=pixel_values.dtype, device=pixel_values.device, memory_format=torch.channels_last)


def _repack(pixel_values: Tensor, result_height: int, result_width: int) -> Tensor:
    """Copy images to [B, rows, groups, 12], channels last, with zeros: 3 rows above, 8 pixels left, and behind."""
    batch_size, _, height, width = pixel_values.shape
    repacked = pixel_values.new_empty(
        batch_size, _PIXELS * result_height + _BORDER_ROWS, result_width + _BORDER_GROUPS, _PIXELS * _CHANNELS
    )
    num_groups = repacked[..., 0].numel()
    _repack_kernel[(triton.cdiv(num_groups, _BLOCK_GROUPS),)](
        pixel_values, repacked, num_groups, height, width, *repacked.shape[1:3], *pixel_values.stride(),
        BLOCK_GROUPS=_BLOCK_GROUPS, num_warps=4,
    )  # fmt: skip
    return repacked


def _arrange(weight: Tensor) -> Tensor:
    """[C, 3, 7, 7] -> [8, 32, 64, 2]: rows, columns and colours, channels, which one of a pair of columns."""
    channels = weight.shape[0]
    arranged = weight.new_zeros(_SIDE + 1, _TAPS, _BLOCK_CHANNELS, 2)
    taps = weight.permute(2, 3, 1, 0)  # rows, columns, colours, channels
    for second in range(2):
        # A pair's values begin with a whole group, one pixel before the inputs of its first column.
        first_tap = _CHANNELS * (1 + STRIDE * second)
        there = arranged[:_SIDE, first_tap : first_tap + _SIDE * _CHANNELS, :channels, second]
        there.unflatten(1, (_SIDE, _CHANNELS)).copy_(taps)
    return arranged


def _num_programs(pixel_values: Tensor) -> tuple[int, int]:
    """Return how many programs share the pairs of columns, and how many the rows."""
    batch_size, _, height, width = pixel_values.shape
    num_pairs = batch_size * (_divide(width, _PIXELS) + 1)
    return _divide(num_pairs - 1, _BLOCK_PAIRS - 1), _divide(_divide(height, _PIXELS), _ROWS)


def _divide(number: int, by: int) -> int:
    """Divide and round up; PyTorch's compiler can follow it."""
    return (number + by - 1) // by


def _apply_stem_by_triton(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    require_cuda(pixel_values, is_interpreted=_IS_INTERPRETED)
    if torch.is_autocast_enabled(pixel_values.device.type):
        dtype = torch.get_autocast_dtype(pixel_values.device.type)
        pixel_values, weight, bias = pixel_values.to(dtype), weight.to(dtype), bias.to(dtype)
    tensors = (pixel_values, weight, bias)
    across, down = _num_programs(pixel_values)
    can = (
        across * down >= _FEWEST_PROGRAMS
        and _BLOCK_CHANNELS // 2 < weight.shape[0] <= _BLOCK_CHANNELS
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and pixel_values.dtype in (torch.bfloat16, torch.float16)
        and all(tensor.dtype == pixel_values.dtype for tensor in tensors)
    )
    if not can:
        return pool_and_normalise(convolve(pixel_values, weight, bias, "triton"), "triton")
    return _apply_stem(pixel_values, weight, bias)


assert (STRIDE, PADDING) == (2, 3), "what the kernels are written for"
assert (POOL_WINDOW, POOL_STRIDE, POOL_PADDING) == (3, 2, 1), "what the kernels are written for"
STEM_IMPLEMENTATIONS["triton"] = _apply_stem_by_triton
