"""Sampling and adaptive mixing by one Triton kernel each way; made known by being imported.

Each program decodes one token: what it samples and all intermediate products stay on the chip, and the way back makes
them once more. Sums are fp32; products round their inputs to the dtype of the matrices, as PyTorch's do. Gradients of
pixels are added up by atomics, in no fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.kernels import require_cuda
from sf_mllm.ops.mixing import MIXING_IMPLEMENTATIONS
from sf_mllm.ops.sampling_triton import locate_points, sample, spread_gradients

_SMALLEST_BLOCK = 16  # of a matrix product
_LARGEST_BLOCK = 128
"""More channels or points than a program can hold go to the reference."""


@triton.jit
def _mix(
    features, points, parameters, token, tokens_per_image, point, output, channel,
    height, width, stride_image, stride_channel, stride_row, stride_column,
    POINTS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, BORDER: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return X, X M, S (X M), fp32, and both matrices, M and S, with their places and what of a block there is.

    Places are in the parameters of a token. With SHARED those of the first image are read for all.
    """
    source = parameters + (token % tokens_per_image if SHARED else token) * (CHANNELS * CHANNELS + OUTPUTS * POINTS)
    row = tl.arange(0, BLOCK_CHANNELS)
    channel_place = row[:, None] * CHANNELS + channel[None, :]
    is_channel = (row < CHANNELS)[:, None] & (channel < CHANNELS)[None, :]
    channel_matrix = tl.load(source + channel_place, mask=is_channel, other=0.0)
    point_place = CHANNELS * CHANNELS + output[:, None] * POINTS + point[None, :]
    is_point = (output < OUTPUTS)[:, None] & (point < POINTS)[None, :]
    point_matrix = tl.load(source + point_place, mask=is_point, other=0.0)
    left, top, x_share, y_share, _x_moves, _y_moves = locate_points(
        points, token * POINTS + point, point < POINTS, height, width, BORDER
    )
    sampled = sample(
        features, token // tokens_per_image, left, top, x_share, y_share, point < POINTS, channel,
        height, width, stride_image, stride_channel, stride_row, stride_column, CHANNELS,
    ).to(features.dtype.element_ty).to(channel_matrix.dtype)  # fmt: skip
    product = tl.dot(sampled, channel_matrix, input_precision="ieee").to(channel_matrix.dtype)
    total = tl.dot(point_matrix, product, input_precision="ieee")
    return sampled, product, total, channel_matrix, channel_place, is_channel, point_matrix, point_place, is_point


@triton.jit
def _mix_kernel(
    features, points, parameters, mixed,
    tokens_per_image, height, width, stride_image, stride_channel, stride_row, stride_column,
    POINTS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, BORDER: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_POINTS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    point, output = tl.arange(0, BLOCK_POINTS), tl.arange(0, BLOCK_OUTPUTS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    _, _, total, _, _, _, _, _, _ = _mix(
        features, points, parameters, token, tokens_per_image, point, output, channel,
        height, width, stride_image, stride_channel, stride_row, stride_column,
        POINTS, OUTPUTS, CHANNELS, BORDER, SHARED, BLOCK_CHANNELS,
    )  # fmt: skip
    result = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    tl.store(
        mixed + token * (OUTPUTS * CHANNELS) + output[:, None] * CHANNELS + channel[None, :],
        result.to(mixed.dtype.element_ty),
        mask=(output < OUTPUTS)[:, None] & (channel < CHANNELS)[None, :],
    )


@triton.jit
def _mix_backward_kernel(
    features, points, parameters, mixed_grad, features_grad, points_grad, parameters_grad,
    tokens_per_image, height, width, stride_image, stride_channel, stride_row, stride_column,
    POINTS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, BORDER: tl.constexpr, SHARED: tl.constexpr,
    WITH_FEATURES: tl.constexpr,
    BLOCK_POINTS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    point, output = tl.arange(0, BLOCK_POINTS), tl.arange(0, BLOCK_OUTPUTS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    sampled, product, total, channel_matrix, channel_place, is_channel, point_matrix, point_place, is_point = _mix(
        features, points, parameters, token, tokens_per_image, point, output, channel,
        height, width, stride_image, stride_channel, stride_row, stride_column,
        POINTS, OUTPUTS, CHANNELS, BORDER, SHARED, BLOCK_CHANNELS,
    )  # fmt: skip
    grad = tl.load(
        mixed_grad + token * (OUTPUTS * CHANNELS) + output[:, None] * CHANNELS + channel[None, :],
        mask=(output < OUTPUTS)[:, None] & (channel < CHANNELS)[None, :],
        other=0.0,
    ).to(tl.float32)
    below = 0.5 * (1 + tl.erf(total * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * total * total)
    total_grad = (grad * (below + total * density)).to(channel_matrix.dtype)
    target = parameters_grad + token * (CHANNELS * CHANNELS + OUTPUTS * POINTS)
    point_matrix_grad = tl.dot(total_grad, tl.trans(product), input_precision="ieee")
    tl.store(target + point_place, point_matrix_grad.to(parameters_grad.dtype.element_ty), mask=is_point)
    product_grad = tl.dot(tl.trans(point_matrix), total_grad, input_precision="ieee").to(channel_matrix.dtype)
    channel_matrix_grad = tl.dot(tl.trans(sampled), product_grad, input_precision="ieee")
    tl.store(target + channel_place, channel_matrix_grad.to(parameters_grad.dtype.element_ty), mask=is_channel)
    sampled_grad = tl.dot(product_grad, tl.trans(channel_matrix), input_precision="ieee")
    # Made once more here: keeping the places through all products costs registers.
    index = token * POINTS + point
    left, top, x_share, y_share, x_moves, y_moves = locate_points(points, index, point < POINTS, height, width, BORDER)
    x_grad, y_grad = spread_gradients(
        features, features_grad, sampled_grad, token // tokens_per_image, left, top, x_share, y_share,
        point < POINTS, channel,
        height, width, stride_image, stride_channel, stride_row, stride_column, CHANNELS, WITH_FEATURES,
    )  # fmt: skip
    tl.store(points_grad + 2 * index, tl.where(x_moves, x_grad * width, 0.0), mask=point < POINTS)
    tl.store(points_grad + 2 * index + 1, tl.where(y_moves, y_grad * height, 0.0), mask=point < POINTS)


_IS_INTERPRETED = not isinstance(_mix_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::sample_and_mix", mutates_args=())
def _sample_and_mix(feature_map: Tensor, points: Tensor, parameters: Tensor, border: bool) -> Tensor:
    """[B, C, H, W], [B, N, P, 2], fp32, and [B or 1, N, C * C + Q * P] -> [B, N, Q, C], dtype of the parameters."""
    points, parameters = points.contiguous(), parameters.contiguous()
    mixed = parameters.new_empty(_shape_of_result(feature_map, points, parameters))
    if mixed.numel():
        _mix_kernel[(mixed.shape[0] * mixed.shape[1],)](
            feature_map, points, parameters, mixed,
            points.shape[1], *feature_map.shape[2:], *feature_map.stride(),
            BORDER=border, SHARED=len(parameters) == 1, **_shape_of_programs(mixed, points),
        )  # fmt: skip
    return mixed


@_sample_and_mix.register_fake
def _(feature_map: Tensor, points: Tensor, parameters: Tensor, border: bool) -> Tensor:
    return parameters.new_empty(_shape_of_result(feature_map, points, parameters))


@torch.library.custom_op("sf_mllm::sample_and_mix_backward", mutates_args=())
def _sample_and_mix_backward(
    feature_map: Tensor, points: Tensor, parameters: Tensor, mixed_grad: Tensor, border: bool, with_features: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of features, channels last, fp32, empty unless wanted, of points, of parameters by image."""
    points, parameters, mixed_grad = points.contiguous(), parameters.contiguous(), mixed_grad.contiguous()
    batch_size, channels, height, width = feature_map.shape
    shape = (batch_size, height, width, channels) if with_features else (0,)
    features_grad = torch.zeros(shape, dtype=torch.float32, device=points.device)
    points_grad = torch.empty_like(points)
    parameters_grad = parameters.new_empty(batch_size, *parameters.shape[1:])
    if mixed_grad.numel():
        _mix_backward_kernel[(mixed_grad.shape[0] * mixed_grad.shape[1],)](
            feature_map, points, parameters, mixed_grad, features_grad, points_grad, parameters_grad,
            points.shape[1], height, width, *feature_map.stride(),
            BORDER=border, SHARED=len(parameters) == 1, WITH_FEATURES=with_features,
            **_shape_of_programs(mixed_grad, points),
        )  # fmt: skip
    return features_grad, points_grad, parameters_grad


@_sample_and_mix_backward.register_fake
def _(
    feature_map: Tensor, points: Tensor, parameters: Tensor, mixed_grad: Tensor, border: bool, with_features: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, channels, height, width = feature_map.shape
    shape = (batch_size, height, width, channels) if with_features else (0,)
    parameters_grad = parameters.new_empty(batch_size, *parameters.shape[1:])
    return points.new_empty(shape), points.new_empty(points.shape), parameters_grad


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    feature_map, points, parameters, ctx.border = inputs
    ctx.save_for_backward(feature_map, points, parameters)


def _differentiate(ctx, mixed_grad):  # type: ignore[no-untyped-def]  # torch's own signature
    feature_map, points, parameters = ctx.saved_tensors
    with_features = ctx.needs_input_grad[0]
    features_grad, points_grad, parameters_grad = _sample_and_mix_backward(
        feature_map, points, parameters, mixed_grad, ctx.border, with_features
    )
    if len(parameters) == 1:
        parameters_grad = parameters_grad.sum(0, keepdim=True)
    if not with_features:
        return None, points_grad, parameters_grad, None
    return features_grad.permute(0, 3, 1, 2).to(feature_map.dtype), points_grad, parameters_grad, None


_sample_and_mix.register_autograd(_differentiate, setup_context=_remember)


def _shape_of_result(feature_map: Tensor, points: Tensor, parameters: Tensor) -> tuple[int, int, int, int]:
    channels = feature_map.shape[1]
    num_outputs = (parameters.shape[-1] - channels**2) // points.shape[2]
    return points.shape[0], points.shape[1], num_outputs, channels


def _shape_of_programs(mixed: Tensor, points: Tensor) -> dict[str, int]:
    """Return the constants that both kernels share."""
    sizes = {"POINTS": points.shape[2], "OUTPUTS": mixed.shape[2], "CHANNELS": mixed.shape[3]}
    blocks = {f"BLOCK_{name}": max(_SMALLEST_BLOCK, triton.next_power_of_2(size)) for name, size in sizes.items()}
    return sizes | blocks | {"num_warps": 2}


def _sample_and_mix_by_triton(feature_map: Tensor, points: Tensor, parameters: Tensor, padding_mode: str) -> Tensor:
    require_cuda(feature_map, is_interpreted=_IS_INTERPRETED)
    largest = max(points.shape[2], *_shape_of_result(feature_map, points, parameters)[2:])
    if largest > _LARGEST_BLOCK or parameters.dtype == torch.float64:
        return MIXING_IMPLEMENTATIONS[REFERENCE](feature_map, points, parameters, padding_mode)
    return _sample_and_mix(feature_map, points, parameters, padding_mode == "border")


MIXING_IMPLEMENTATIONS["triton"] = _sample_and_mix_by_triton
