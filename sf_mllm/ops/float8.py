"""Products of float8 numbers (e4m3), each tensor of which has one scale: what a 1 in it stands for."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sf_mllm.ops.implementations import REFERENCE, choose

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Float8Layer(NamedTuple):
    """A linear layer; its sizes D and H are multiples of 16.

    `weight` [H, D], e4m3; `bias` [H], bf16, or None; `input_scale` and `weight_scale`, 0-d, fp32.
    """

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor
    weight_scale: Tensor


def quantise(values: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale and round to e4m3; what is too large is cut off, and NaN stays NaN."""
    # Left to itself PyTorch 2.11 makes NaN of what is too large, on a CPU, and 2.14 the largest value.
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def multiply(inputs: Tensor, layer: Float8Layer) -> Tensor:
    """Apply a linear layer to quantised inputs [..., D]; return [..., H], bf16."""
    product = torch._scaled_mm(
        inputs.reshape(-1, inputs.shape[-1]),
        layer.weight.t(),
        scale_a=layer.input_scale,
        scale_b=layer.weight_scale,
        bias=layer.bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product.reshape(*inputs.shape[:-1], len(layer.weight))


def multiply_and_activate(
    inputs: Tensor, layer: Float8Layer, activation: str, result_scale: Tensor, implementation: str = REFERENCE
) -> Tensor:
    """Apply a linear layer and an activation, and quantise for the next layer.

    Args:
        inputs: [..., D], e4m3.
        layer: from D to H.
        activation: name in transformers' `ACT2FN`.
        result_scale: 0-d, fp32.
        implementation: a name of `FLOAT8_IMPLEMENTATIONS`.

    Returns:
        [..., H], e4m3.

    Raises:
        ValueError: the implementation is not loaded.
    """
    return choose(FLOAT8_IMPLEMENTATIONS, implementation)(inputs, layer, activation, result_scale)


def _one_after_the_other(inputs: Tensor, layer: Float8Layer, activation: str, result_scale: Tensor) -> Tensor:
    """The reference, by PyTorch's own operations."""
    return quantise(ACT2FN[activation](multiply(inputs, layer)), result_scale)


FLOAT8_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Float8Layer, str, Tensor], Tensor]] = {
    REFERENCE: _one_after_the_other
}
"""What `multiply_and_activate` does, by name. `sf_mllm.ops.kernels` loads further ones."""
