"""A linear layer and its activation by one Triton kernel, for many tokens in 16 or 8 bits; known by being imported.

Between the two PyTorch writes the product to memory and reads it again. Here the activation is applied to the sums
while they are still on the chip, in fp32, and the bias with it. That saves more than the product loses to cuBLAS's
where there are many tokens. As many programs as the device has multiprocessors take tile after tile, so that one writes
its results while it multiplies for the next. There is no way back: what trains goes to the reference.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sf_mllm.ops.float8 import FLOAT8_IMPLEMENTATIONS, LARGEST, Float8Layer
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.kernels import require_cuda
from sf_mllm.ops.linear_activation import LINEAR_ACTIVATION_IMPLEMENTATIONS

_ACTIVATIONS = {"quick_gelu": 0, "gelu": 1, "gelu_pytorch_tanh": 2}
"""Those of the ViTs that a cortex comes from; others go to the reference."""
_FEWEST_TILES = 396
"""Three for each multiprocessor of an H200, where it paid with 512 and more; with 288 it took longer than two steps."""
_ROWS, _COLUMNS = 128, 256  # a tile of the result
_STEP = 128  # bytes that a program goes through the depth at once
_SHARED_MEMORY = 214_040  # bytes that a program needs
_GROUP = 8  # rows of tiles that are worked on together, whose inputs stay in the cache meanwhile
_ALIGNMENT = 16  # bytes, of what a tensor descriptor tells of
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _logistic(exponents):
    """1 / (1 + 2 ** -x), to 7e-6 of itself.

    Powers and quotients come from units that are few: an eighth as many as add and multiply. With both from there a
    tile of depth 1,024 would wait for them a quarter as long as it multiplies, so the quotient is by Newton's steps.
    """
    inverse = tl.minimum(1 + tl.exp2(-exponents), 1e30)
    result = (0x7EF311C7 - inverse.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # off by a 20th at most
    result *= 2 - inverse * result
    return result * (2 - inverse * result)


@triton.jit
def _activate(values, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        values = values * _logistic(2.4554669595930156 * values)  # 1.702 / ln(2)
    elif ACTIVATION == 1:
        values = 0.5 * values * (1 + tl.erf(values * 0.7071067811865476))
    else:  # 0.5 * (1 + tanh(x)) is the logistic function of 2 * x; the factor is sqrt(8 / pi) / ln(2)
        values = values * _logistic(2.302208198144325 * (values + 0.044715 * values * values * values))
    return values


@triton.jit
def _linear_activation_kernel(
    tokens, weight, bias, scale, weight_scale, result_scale, result, num_rows, num_columns,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, ACTIVATION: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    factor, result_factor = 1.0, 1.0
    if FLOAT8:
        factor, result_factor = tl.load(scale) * tl.load(weight_scale), 1 / tl.load(result_scale)
    down, across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        first = tile // (GROUP * across) * GROUP
        height = min(down - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * ROWS
        column = tile % (GROUP * across) // height * COLUMNS
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, DEPTH, STEP):
            sums = tl.dot(tokens.load([row, depth]), weight.load([column, depth]).T, sums)
        place = column + tl.arange(0, COLUMNS)
        added = tl.load(bias + place, mask=place < num_columns, other=0.0).to(tl.float32)[None, :]
        if FLOAT8:
            values = _activate(sums * factor + added, ACTIVATION) * result_factor
            values = tl.clamp(values, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
            result.store([row, column], values.to(tl.float8e4nv))
        else:
            result.store([row, column], _activate(sums + added, ACTIVATION).to(bias.dtype.element_ty))


_IS_INTERPRETED = not isinstance(_linear_activation_kernel, triton.JITFunction)
"""A constant, since the compiler of PyTorch cannot ask what a kernel is."""


@torch.library.custom_op("sf_mllm::linear_activation", mutates_args=())
def _linear_activation(tokens: Tensor, weight: Tensor, bias: Tensor, activation: int) -> Tensor:
    """[..., D] -> [..., H]."""
    return _multiply(tokens, weight, bias, [], activation)


@_linear_activation.register_fake
def _(tokens: Tensor, weight: Tensor, bias: Tensor, activation: int) -> Tensor:
    return tokens.new_empty(*tokens.shape[:-1], weight.shape[0])


@torch.library.custom_op("sf_mllm::float8_linear_activation", mutates_args=())
def _float8_linear_activation(
    tokens: Tensor, weight: Tensor, bias: Tensor, scales: list[Tensor], activation: int
) -> Tensor:
    """[..., D] -> [..., H], both e4m3. The scales are those of the tokens, of the weight and of the result."""
    return _multiply(tokens, weight, bias, scales, activation)


@_float8_linear_activation.register_fake
def _(tokens: Tensor, weight: Tensor, bias: Tensor, scales: list[Tensor], activation: int) -> Tensor:
    return tokens.new_empty(*tokens.shape[:-1], weight.shape[0])


def _multiply(tokens: Tensor, weight: Tensor, bias: Tensor, scales: list[Tensor], activation: int) -> Tensor:
    """What both operations do; 16 bits have no scales."""
    rows, weight, bias = tokens.reshape(-1, tokens.shape[-1]).contiguous(), weight.contiguous(), bias.contiguous()
    result = tokens.new_empty(*tokens.shape[:-1], weight.shape[0])
    if result.numel():
        step = _STEP // tokens.element_size()
        flat = result.view(-1, len(weight))
        tiles = triton.cdiv(flat.shape[0], _ROWS) * triton.cdiv(flat.shape[1], _COLUMNS)
        programs = min(_num_programs(tokens.device), tiles)
        _linear_activation_kernel[(programs,)](
            TensorDescriptor.from_tensor(rows, [_ROWS, step]),
            TensorDescriptor.from_tensor(weight, [_COLUMNS, step]),
            bias,
            *(scales or (None, None, None)),
            TensorDescriptor.from_tensor(flat, [_ROWS, _COLUMNS]),
            *flat.shape,
            DEPTH=rows.shape[1],
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            STEP=step,
            GROUP=_GROUP,
            PROGRAMS=programs,
            ACTIVATION=activation,
            FLOAT8=bool(scales),
            num_warps=8,
            num_stages=3,
        )
    return result


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Return how many programs a device runs at once, each on a multiprocessor of its own."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@torch.compiler.assume_constant_result
def _has_room(device: torch.device) -> bool:
    """Whether a program's tiles fit into a multiprocessor; those of an H100 do, which also copies them by itself."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True  # interpreted, or a pretended device
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"] >= _SHARED_MEMORY


def _by_triton(tokens: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    tensors = (tokens, weight, bias)
    can = (
        _can(tokens, weight, activation)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and tokens.dtype in (torch.bfloat16, torch.float16)
        and all(tensor.dtype == tokens.dtype for tensor in tensors)
    )
    if not can:
        return LINEAR_ACTIVATION_IMPLEMENTATIONS[REFERENCE](tokens, weight, bias, activation)
    return _linear_activation(tokens, weight, bias, _ACTIVATIONS[activation])


def _by_triton_in_float8(inputs: Tensor, layer: Float8Layer, activation: str, result_scale: Tensor) -> Tensor:
    if layer.bias is None or not _can(inputs, layer.weight, activation):
        return FLOAT8_IMPLEMENTATIONS[REFERENCE](inputs, layer, activation, result_scale)
    scales = [layer.input_scale, layer.weight_scale, result_scale]
    return _float8_linear_activation(inputs, layer.weight, layer.bias, scales, _ACTIVATIONS[activation])


def _can(tokens: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether the kernel takes tensors of these sizes here, and pays."""
    require_cuda(tokens, is_interpreted=_IS_INTERPRETED)
    down, across = tokens.numel() // tokens.shape[-1] // _ROWS, weight.shape[0] // _COLUMNS  # whole ones
    return (
        down * across >= _FEWEST_TILES
        and activation in _ACTIVATIONS
        and _has_room(tokens.device)
        and all(size * tokens.element_size() % _ALIGNMENT == 0 for size in weight.shape)
    )


LINEAR_ACTIVATION_IMPLEMENTATIONS["triton"] = _by_triton
FLOAT8_IMPLEMENTATIONS["triton"] = _by_triton_in_float8
