"""Self-attention over few tokens by one Triton kernel each way; made known by being imported.

Each program holds all tokens of one head: scores never leave the chip, and the way back computes them once more from
the projections, so nothing else is kept. Projections are read and gradients written where the linear layer has them.
Scores, their softmax and all sums are fp32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sf_mllm.ops.attention import ATTENTION_IMPLEMENTATIONS
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.kernels import require_cuda

_LARGEST_NUM_TOKENS = 128
"""More tokens, or wider heads, than a program can hold go to the reference."""
_LARGEST_HEAD_WIDTH = 128
_SMALLEST_BLOCK = 16  # of a matrix product
_LOG2_E = math.log2(math.e)


@triton.jit
def _load(packed, which, token, column, num_tokens, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """Return queries, keys or values (0, 1, 2) of a head, zero beyond its tokens and columns."""
    mask = (token < num_tokens)[:, None] & (column < WIDTH)[None, :]
    place = token[:, None] * (3 * HEADS * WIDTH) + which * (HEADS * WIDTH) + column[None, :]
    return tl.load(packed + place, mask=mask, other=0.0)


@triton.jit
def _softmax(query, key, token, num_tokens, scale):
    """Return the weights of all keys for each query, fp32; `scale` is in powers of two."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where((token < num_tokens)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _attend_kernel(
    packed, mixed, num_tokens, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    token, column = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_WIDTH)
    packed += image * num_tokens * (3 * HEADS * WIDTH) + head * WIDTH
    query = _load(packed, 0, token, column, num_tokens, WIDTH, HEADS)
    key = _load(packed, 1, token, column, num_tokens, WIDTH, HEADS)
    value = _load(packed, 2, token, column, num_tokens, WIDTH, HEADS)
    weights = _softmax(query, key, token, num_tokens, scale)
    result = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    place = token[:, None] * (HEADS * WIDTH) + column[None, :]
    mask = (token < num_tokens)[:, None] & (column < WIDTH)[None, :]
    mixed += image * num_tokens * (HEADS * WIDTH) + head * WIDTH
    tl.store(mixed + place, result.to(mixed.dtype.element_ty), mask=mask)


@triton.jit
def _attend_backward_kernel(
    packed, mixed_grad, packed_grad, num_tokens, scale, natural_scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    token, column = tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_WIDTH)
    mask = (token < num_tokens)[:, None] & (column < WIDTH)[None, :]
    packed += image * num_tokens * (3 * HEADS * WIDTH) + head * WIDTH
    packed_grad += image * num_tokens * (3 * HEADS * WIDTH) + head * WIDTH
    mixed_grad += image * num_tokens * (HEADS * WIDTH) + head * WIDTH
    query = _load(packed, 0, token, column, num_tokens, WIDTH, HEADS)
    key = _load(packed, 1, token, column, num_tokens, WIDTH, HEADS)
    value = _load(packed, 2, token, column, num_tokens, WIDTH, HEADS)
    grad = tl.load(mixed_grad + token[:, None] * (HEADS * WIDTH) + column[None, :], mask=mask, other=0.0)
    weights = _softmax(query, key, token, num_tokens, scale)
    place = token[:, None] * (3 * HEADS * WIDTH) + column[None, :]
    value_grad = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
    tl.store(packed_grad + place + 2 * HEADS * WIDTH, value_grad.to(packed_grad.dtype.element_ty), mask=mask)
    weights_grad = tl.dot(grad, tl.trans(value), input_precision="ieee")
    mean = tl.sum(weights * weights_grad, axis=1)
    scores_grad = (weights * (weights_grad - mean[:, None]) * natural_scale).to(query.dtype)
    query_grad = tl.dot(scores_grad, key, input_precision="ieee")
    tl.store(packed_grad + place, query_grad.to(packed_grad.dtype.element_ty), mask=mask)
    key_grad = tl.dot(tl.trans(scores_grad), query, input_precision="ieee")
    tl.store(packed_grad + place + HEADS * WIDTH, key_grad.to(packed_grad.dtype.element_ty), mask=mask)


_IS_INTERPRETED = not isinstance(_attend_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::attend", mutates_args=())
def _attend(packed: Tensor, num_heads: int) -> Tensor:
    """[B, T, 3 * D] -> [B, T, D]."""
    packed = packed.contiguous()
    batch_size, num_tokens, width = packed.shape[0], packed.shape[1], packed.shape[2] // 3
    mixed = packed.new_empty(batch_size, num_tokens, width)
    if mixed.numel():
        shape, scale = _shape_of_programs(packed, num_heads)
        _attend_kernel[(batch_size * num_heads,)](packed, mixed, num_tokens, scale * _LOG2_E, **shape)
    return mixed


@_attend.register_fake
def _(packed: Tensor, num_heads: int) -> Tensor:
    return packed.new_empty(packed.shape[0], packed.shape[1], packed.shape[2] // 3)


@torch.library.custom_op("sf_mllm::attend_backward", mutates_args=())
def _attend_backward(packed: Tensor, mixed_grad: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of the packed projections."""
    packed, mixed_grad = packed.contiguous(), mixed_grad.contiguous()
    batch_size, num_tokens, _ = mixed_grad.shape
    packed_grad = torch.empty_like(packed)
    if packed_grad.numel():
        shape, scale = _shape_of_programs(packed, num_heads)
        _attend_backward_kernel[(batch_size * num_heads,)](
            packed, mixed_grad, packed_grad, num_tokens, scale * _LOG2_E, scale, **shape
        )
    return packed_grad


@_attend_backward.register_fake
def _(packed: Tensor, mixed_grad: Tensor, num_heads: int) -> Tensor:
    return packed.new_empty(packed.shape)


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    packed, ctx.num_heads = inputs
    ctx.save_for_backward(packed)


def _differentiate(ctx, mixed_grad):  # type: ignore[no-untyped-def]  # torch's own signature
    (packed,) = ctx.saved_tensors
    return _attend_backward(packed, mixed_grad, ctx.num_heads), None


_attend.register_autograd(_differentiate, setup_context=_remember)


def _shape_of_programs(packed: Tensor, num_heads: int) -> tuple[dict[str, int], float]:
    """Return the constants of both kernels, and what scores are multiplied by."""
    head_width = packed.shape[2] // (3 * num_heads)
    block_tokens = max(_SMALLEST_BLOCK, triton.next_power_of_2(packed.shape[1]))
    constants = {
        "HEADS": num_heads,
        "WIDTH": head_width,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_WIDTH": max(_SMALLEST_BLOCK, triton.next_power_of_2(head_width)),
        "num_warps": 8 if block_tokens > 64 or packed.dtype == torch.float32 else 2,
    }
    return constants, 1 / math.sqrt(head_width)


def _attend_by_triton(packed: Tensor, num_heads: int) -> Tensor:
    require_cuda(packed, is_interpreted=_IS_INTERPRETED)
    too_many = packed.shape[1] > _LARGEST_NUM_TOKENS or packed.shape[2] > 3 * num_heads * _LARGEST_HEAD_WIDTH
    if too_many or packed.dtype == torch.float64:
        return ATTENTION_IMPLEMENTATIONS[REFERENCE](packed, num_heads)
    return _attend(packed, num_heads)


ATTENTION_IMPLEMENTATIONS["triton"] = _attend_by_triton
