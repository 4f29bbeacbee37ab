"""The stem's pooling and norm by Triton kernels; made known by being imported.

Where there will be a way back, the way forward notes in a byte which of nine pixels was the largest; the way back needs
that, the result and one number a pixel in place of the convolution's result, the largest tensor of the encoder. There
each pixel collects from the four windows that it can lie in, so that nothing is added up by atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.kernels import require_cuda
from sf_mllm.ops.pooling import POOL_EPS, POOL_PADDING, POOL_STRIDE, POOL_WINDOW, POOLING_IMPLEMENTATIONS

_BLOCK_PIXELS = 16
_LARGEST_NUM_CHANNELS = 128
"""More channels than a program can hold go to the reference."""


@triton.jit
def _pool_kernel(
    features, result, largest, deviations, num_results, height, width, result_height, result_width,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, EPS: tl.constexpr,
    NOTES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    is_result = index < num_results
    mask = is_result[:, None] & (channel < CHANNELS)[None, :]
    image = index // (result_height * result_width)
    place = (index - image * result_height * result_width).to(tl.int32)
    top, left = 2 * (place // result_width) - 1, 2 * (place % result_width) - 1
    best = tl.full([BLOCK_PIXELS, BLOCK_CHANNELS], float("-inf"), dtype=tl.float32)
    which = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype=tl.int32)
    for step in tl.static_range(9):  # the first one of several equal ones, as PyTorch
        row, column = top + step // 3, left + step % 3
        exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        start = (image * height + row) * width + column
        value = tl.load(
            features + start[:, None] * CHANNELS + channel[None, :], mask=mask & exists[:, None], other=float("-inf")
        ).to(tl.float32)
        if NOTES:
            is_larger = (value > best) | (value != value)
            best = tl.where(is_larger, value, best)
            which = tl.where(is_larger, step, which)
        else:
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    is_positive = best > 0
    best = tl.where(mask & (is_positive | (best != best)), best, 0.0)  # NaN stays
    mean = tl.sum(best, axis=1) / CHANNELS
    centred = tl.where(mask, best - mean[:, None], 0.0)
    deviation = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + EPS)
    where = index[:, None] * CHANNELS + channel[None, :]
    tl.store(result + where, (centred * deviation[:, None]).to(result.dtype.element_ty), mask=mask)
    if NOTES:
        tl.store(largest + where, tl.where(is_positive, which, 9).to(tl.uint8), mask=mask)  # 9: no gradient
        tl.store(deviations + index, deviation, mask=is_result)


@triton.jit
def _unnormalise_kernel(
    result_grad, result, deviations, pooled_grad, num_results,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    mask = (index < num_results)[:, None] & (channel < CHANNELS)[None, :]
    where = index[:, None] * CHANNELS + channel[None, :]
    grad = tl.load(result_grad + where, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(result + where, mask=mask, other=0.0).to(tl.float32)
    deviation = tl.load(deviations + index, mask=index < num_results, other=0.0)
    mean = tl.sum(grad, axis=1) / CHANNELS
    slope = tl.sum(grad * value, axis=1) / CHANNELS
    grad = (grad - mean[:, None] - value * slope[:, None]) * deviation[:, None]
    tl.store(pooled_grad + where, grad.to(pooled_grad.dtype.element_ty), mask=mask)


@triton.jit
def _unpool_kernel(
    pooled_grad, largest, features_grad, num_pixels, height, width, result_height, result_width,
    CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    mask = (index < num_pixels)[:, None] & (channel < CHANNELS)[None, :]
    image = index // (height * width)
    place = (index - image * height * width).to(tl.int32)
    row, column = place // width, place % width
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], dtype=tl.float32)
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            # Window k covers the rows 2k - 1 to 2k + 1: an even row lies in one window, an odd one in two.
            window_row, window_column = row // 2 + below, column // 2 + right
            row_step, column_step = row - 2 * window_row + 1, column - 2 * window_column + 1
            exists = (
                (row_step >= 0) & (column_step >= 0) & (window_row < result_height) & (window_column < result_width)
            )
            start = (image * result_height + window_row) * result_width + window_column
            where = start[:, None] * CHANNELS + channel[None, :]
            is_there = mask & exists[:, None]
            which = tl.load(largest + where, mask=is_there, other=9).to(tl.int32)
            is_source = is_there & (which == (3 * row_step + column_step)[:, None])
            total += tl.load(pooled_grad + where, mask=is_source, other=0.0).to(tl.float32)
    tl.store(
        features_grad + index[:, None] * CHANNELS + channel[None, :],
        total.to(features_grad.dtype.element_ty),
        mask=mask,
    )


_IS_INTERPRETED = not isinstance(_pool_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::pool_and_normalise", mutates_args=())
def _pool_and_normalise(features: Tensor, notes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[B, C, H, W] -> the result, which pixel was the largest, 1 / deviation [B, H', W'] in fp32; channels last.

    Without notes the last two are empty, and there are no gradients.
    """
    features = features.contiguous(memory_format=torch.channels_last)
    result, largest, deviations = _empty_results(features, notes)
    if result.numel():
        num_results = result[:, 0].numel()
        _pool_kernel[_num_programs(num_results)](
            features, result, largest, deviations, num_results, *features.shape[2:], *result.shape[2:],
            EPS=POOL_EPS, NOTES=notes, **_shape_of_programs(features),
        )  # fmt: skip
    return result, largest, deviations


@_pool_and_normalise.register_fake
def _(features: Tensor, notes: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(features, notes)


def _empty_results(features: Tensor, notes: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, channels, height, width = features.shape
    shape = (batch_size, channels, (height - 1) // POOL_STRIDE + 1, (width - 1) // POOL_STRIDE + 1)

    noted = shape if notes else (0, *shape[1:])
    result, largest = (
        torch.empty(size, dtype=dtype, device=features.device, memory_format=torch.channels_last)
        for size, dtype in ((shape, features.dtype), (noted, torch.uint8))
    )
    return result, largest, features.new_empty((noted[0], *shape[2:]), dtype=torch.float32)


@torch.library.custom_op("sf_mllm::pool_and_normalise_backward", mutates_args=())
def _pool_and_normalise_backward(
    result_grad: Tensor, result: Tensor, largest: Tensor, deviations: Tensor, height: int, width: int
) -> Tensor:
    """Return the gradient of the features, [B, C, height, width], channels last."""
    result_grad = result_grad.contiguous(memory_format=torch.channels_last)
    features_grad = _empty_features(result, height, width)
    if features_grad.numel():
        pooled_grad, shape = torch.empty_like(result), _shape_of_programs(result)
        _unnormalise_kernel[_num_programs(deviations.numel())](
            result_grad, result, deviations, pooled_grad, deviations.numel(), **shape
        )
        num_pixels = len(result) * height * width
        _unpool_kernel[(triton.cdiv(num_pixels, _BLOCK_PIXELS),)](
            pooled_grad, largest, features_grad, num_pixels, height, width, *result.shape[2:], **shape
        )
    return features_grad


@_pool_and_normalise_backward.register_fake
def _(result_grad: Tensor, result: Tensor, largest: Tensor, deviations: Tensor, height: int, width: int) -> Tensor:
    return _empty_features(result, height, width)


def _empty_features(result: Tensor, height: int, width: int) -> Tensor:
    shape = (*result.shape[:2], height, width)
    return torch.empty(shape, dtype=result.dtype, device=result.device, memory_format=torch.channels_last)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    features, notes = inputs
    assert notes, "asked for gradients of what nothing was noted of"
    result, largest, deviations = output
    ctx.save_for_backward(result, largest, deviations)
    ctx.size = features.shape[2:]
    ctx.mark_non_differentiable(largest, deviations)


def _differentiate(ctx, result_grad, _largest_grad, _deviations_grad):  # type: ignore[no-untyped-def]
    return _pool_and_normalise_backward(result_grad, *ctx.saved_tensors, *ctx.size), None


_pool_and_normalise.register_autograd(_differentiate, setup_context=_remember)


def _num_programs(num_results: int) -> tuple[int]:
    return (triton.cdiv(num_results, _BLOCK_PIXELS),)


def _shape_of_programs(features: Tensor) -> dict[str, int]:
    """Return the constants that all kernels share."""
    channels = features.shape[1]
    return {"CHANNELS": channels, "BLOCK_CHANNELS": triton.next_power_of_2(channels), "BLOCK_PIXELS": _BLOCK_PIXELS}


def _pool_by_triton(features: Tensor) -> Tensor:
    require_cuda(features, is_interpreted=_IS_INTERPRETED)
    if features.shape[1] > _LARGEST_NUM_CHANNELS or features.dtype == torch.float64:
        return POOLING_IMPLEMENTATIONS[REFERENCE](features)
    return _pool_and_normalise(features, torch.is_grad_enabled() and features.requires_grad)[0]


assert (POOL_WINDOW, POOL_STRIDE, POOL_PADDING) == (3, 2, 1), "what the kernels are written for"
POOLING_IMPLEMENTATIONS["triton"] = _pool_by_triton
