"""Bilinear reads by one Triton kernel each way, which read and write whole pixels; made known by being imported.

The kernels take a feature map as it lies in memory and are made for one whose pixels are whole there (channels last).
Every sum is made in fp32; gradients of pixels are added up by atomics, in no fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sf_mllm.ops.kernels import require_cuda
from sf_mllm.ops.sampling import SAMPLING_IMPLEMENTATIONS

_BLOCK_POINTS = 16
_LARGEST_BLOCK_CHANNELS = 128


@triton.jit
def locate_points(points, index, is_point, height, width, BORDER: tl.constexpr):
    """Return the pixel up and left of each point, the weights of the next ones, and whether the point is free to move.

    Coordinates are in pixels, whole numbers at the centres of pixels. At or beyond the outermost centres "border" keeps
    a point where it is.
    """
    x = tl.load(points + 2 * index, mask=is_point, other=0.0) * width - 0.5
    y = tl.load(points + 2 * index + 1, mask=is_point, other=0.0) * height - 0.5
    x_moves, y_moves = is_point, is_point
    if BORDER:
        x_moves, y_moves = is_point & (x > 0) & (x < width - 1), is_point & (y > 0) & (y < height - 1)
        x = tl.minimum(tl.maximum(x, 0.0), width - 1.0)
        y = tl.minimum(tl.maximum(y, 0.0), height - 1.0)
    left, top = tl.floor(x), tl.floor(y)
    return left, top, x - left, y - top, x_moves, y_moves


@triton.jit
def locate_pixel(image, column, row, is_point, height, width, stride_image, stride_row, stride_column):
    """Return the place of a pixel in memory, and whether there is one: a comparison with NaN says no."""
    exists = is_point & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column = tl.where(exists, column, 0.0).to(tl.int64)
    row = tl.where(exists, row, 0.0).to(tl.int64)
    return image * stride_image + row * stride_row + column * stride_column, exists


@triton.jit
def sample(
    features, image, left, top, x_share, y_share, is_point, channel,
    height, width, stride_image, stride_channel, stride_row, stride_column, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return features [points, channels] between four pixels each, fp32."""
    total = tl.zeros([left.shape[0], channel.shape[0]], dtype=tl.float32)
    for right in tl.static_range(2):
        for bottom in tl.static_range(2):
            place, exists = locate_pixel(
                image, left + right, top + bottom, is_point, height, width, stride_image, stride_row, stride_column
            )
            weight = (x_share if right else 1 - x_share) * (y_share if bottom else 1 - y_share)
            value = tl.load(
                features + place[:, None] + channel[None, :] * stride_channel,
                mask=exists[:, None] & (channel < CHANNELS)[None, :],
                other=0.0,
            )
            total += weight[:, None] * value.to(tl.float32)
    return total


@triton.jit
def spread_gradients(
    features, features_grad, sampled_grad, image, left, top, x_share, y_share, is_point, channel,
    height, width, stride_image, stride_channel, stride_row, stride_column,
    CHANNELS: tl.constexpr, WITH_FEATURES: tl.constexpr,
):  # fmt: skip
    """Return how a loss changes with points, in pixels, and add to the gradients of features, which lie channels last.

    `sampled_grad` [points, channels] is fp32, and zero where there is no point or channel.
    """
    x_grad = tl.zeros([left.shape[0]], dtype=tl.float32)
    y_grad = tl.zeros([left.shape[0]], dtype=tl.float32)
    for right in tl.static_range(2):
        for bottom in tl.static_range(2):
            place, exists = locate_pixel(
                image, left + right, top + bottom, is_point, height, width, stride_image, stride_row, stride_column
            )
            x_weight = x_share if right else 1 - x_share
            y_weight = y_share if bottom else 1 - y_share
            mask = exists[:, None] & (channel < CHANNELS)[None, :]
            value = tl.load(features + place[:, None] + channel[None, :] * stride_channel, mask=mask, other=0.0)
            product = tl.sum(sampled_grad * value.to(tl.float32), axis=1)
            x_grad += (y_weight if right else -y_weight) * product
            y_grad += (x_weight if bottom else -x_weight) * product
            if WITH_FEATURES:
                target, _exists = locate_pixel(
                    image, left + right, top + bottom, is_point, height, width,
                    height * width * CHANNELS, width * CHANNELS, CHANNELS,
                )  # fmt: skip
                tl.atomic_add(
                    features_grad + target[:, None] + channel[None, :],
                    (x_weight * y_weight)[:, None] * sampled_grad,
                    mask=mask,
                    sem="relaxed",
                )
    return x_grad, y_grad


@triton.jit
def _sample_kernel(
    features, points, sampled,
    num_points, points_per_image, height, width,
    stride_image, stride_channel, stride_row, stride_column,
    CHANNELS: tl.constexpr, BORDER: tl.constexpr, BLOCK_POINTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    is_point = index < num_points
    image = index // points_per_image
    left, top, x_share, y_share, _x_moves, _y_moves = locate_points(points, index, is_point, height, width, BORDER)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    total = sample(
        features, image, left, top, x_share, y_share, is_point, channel,
        height, width, stride_image, stride_channel, stride_row, stride_column, CHANNELS,
    )  # fmt: skip
    tl.store(
        sampled + index[:, None] * CHANNELS + channel[None, :],
        total.to(sampled.dtype.element_ty),
        mask=is_point[:, None] & (channel < CHANNELS)[None, :],
    )


@triton.jit
def _sample_backward_kernel(
    features, points, sampled_grad, features_grad, points_grad,
    num_points, points_per_image, height, width,
    stride_image, stride_channel, stride_row, stride_column,
    CHANNELS: tl.constexpr, BORDER: tl.constexpr, WITH_FEATURES: tl.constexpr,
    BLOCK_POINTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    is_point = index < num_points
    image = index // points_per_image
    left, top, x_share, y_share, x_moves, y_moves = locate_points(points, index, is_point, height, width, BORDER)
    x_grad = tl.zeros([BLOCK_POINTS], dtype=tl.float32)
    y_grad = tl.zeros([BLOCK_POINTS], dtype=tl.float32)
    for first in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)
        grad = tl.load(
            sampled_grad + index[:, None] * CHANNELS + channel[None, :],
            mask=is_point[:, None] & (channel < CHANNELS)[None, :],
            other=0.0,
        ).to(tl.float32)
        x_part, y_part = spread_gradients(
            features, features_grad, grad, image, left, top, x_share, y_share, is_point, channel,
            height, width, stride_image, stride_channel, stride_row, stride_column, CHANNELS, WITH_FEATURES,
        )  # fmt: skip
        x_grad += x_part
        y_grad += y_part
    tl.store(points_grad + 2 * index, tl.where(x_moves, x_grad * width, 0.0), mask=is_point)
    tl.store(points_grad + 2 * index + 1, tl.where(y_moves, y_grad * height, 0.0), mask=is_point)


_IS_INTERPRETED = not isinstance(_sample_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::sample_points", mutates_args=())
def _sample(feature_map: Tensor, points: Tensor, border: bool) -> Tensor:
    """[B, C, H, W] and [B, N, P, 2], fp32 -> [B, N, P, C] in the dtype of the feature map."""
    points = points.contiguous()
    batch_size, channels, height, width = feature_map.shape
    sampled = feature_map.new_empty((*points.shape[:-1], channels))
    num_points = points.numel() // 2
    block = _block_channels(channels)
    if num_points:
        _sample_kernel[triton.cdiv(num_points, _BLOCK_POINTS), triton.cdiv(channels, block)](
            feature_map, points, sampled,
            num_points, num_points // batch_size, height, width, *feature_map.stride(),
            CHANNELS=channels, BORDER=border, BLOCK_POINTS=_BLOCK_POINTS, BLOCK_CHANNELS=block,
        )  # fmt: skip
    return sampled


@_sample.register_fake
def _(feature_map: Tensor, points: Tensor, border: bool) -> Tensor:
    return feature_map.new_empty((*points.shape[:-1], feature_map.shape[1]))


@torch.library.custom_op("sf_mllm::sample_points_backward", mutates_args=())
def _sample_backward(
    feature_map: Tensor, points: Tensor, sampled_grad: Tensor, border: bool, with_features: bool
) -> tuple[Tensor, Tensor]:
    """Return gradients of features, channels last, fp32, empty unless wanted, and of points."""
    points, sampled_grad = points.contiguous(), sampled_grad.contiguous()
    batch_size, channels, height, width = feature_map.shape
    shape = (batch_size, height, width, channels) if with_features else (0,)
    features_grad = torch.zeros(shape, dtype=torch.float32, device=points.device)
    points_grad = torch.empty_like(points)
    num_points = points.numel() // 2
    if num_points:
        _sample_backward_kernel[(triton.cdiv(num_points, _BLOCK_POINTS),)](
            feature_map, points, sampled_grad, features_grad, points_grad,
            num_points, num_points // batch_size, height, width, *feature_map.stride(),
            CHANNELS=channels, BORDER=border, WITH_FEATURES=with_features,
            BLOCK_POINTS=_BLOCK_POINTS, BLOCK_CHANNELS=_block_channels(channels),
        )  # fmt: skip
    return features_grad, points_grad


@_sample_backward.register_fake
def _(
    feature_map: Tensor, points: Tensor, sampled_grad: Tensor, border: bool, with_features: bool
) -> tuple[Tensor, Tensor]:
    batch_size, channels, height, width = feature_map.shape
    shape = (batch_size, height, width, channels) if with_features else (0,)
    return points.new_empty(shape, dtype=torch.float32), points.new_empty(points.shape)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    feature_map, points, ctx.border = inputs
    ctx.save_for_backward(feature_map, points)


def _differentiate(ctx, sampled_grad):  # type: ignore[no-untyped-def]  # torch's own signature
    feature_map, points = ctx.saved_tensors
    with_features = ctx.needs_input_grad[0]
    features_grad, points_grad = _sample_backward(feature_map, points, sampled_grad, ctx.border, with_features)
    if not with_features:
        return None, points_grad, None
    return features_grad.permute(0, 3, 1, 2).to(feature_map.dtype), points_grad, None


_sample.register_autograd(_differentiate, setup_context=_remember)


def _block_channels(channels: int) -> int:
    return min(triton.next_power_of_2(channels), _LARGEST_BLOCK_CHANNELS)


def _sample_by_triton(feature_map: Tensor, points: Tensor, padding_mode: str) -> Tensor:
    require_cuda(feature_map, is_interpreted=_IS_INTERPRETED)
    return _sample(feature_map, points, padding_mode == "border")


SAMPLING_IMPLEMENTATIONS["triton"] = _sample_by_triton
