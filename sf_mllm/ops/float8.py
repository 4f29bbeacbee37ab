"""Products of float8 numbers (e4m3), each tensor of which has one scale: what a 1 in it stands for."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sf_mllm.ops.implementations import REFERENCE, choose

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(values: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale and round to e4m3; what is too large is cut off, and NaN stays NaN."""
    # Left to itself PyTorch 2.11 makes NaN of what is too large, on a CPU, and 2.14 the largest value.
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Apply a linear layer.

    Args:
        inputs: [..., D], e4m3; D and H are multiples of 16.
        weight: [H, D], e4m3.
        bias: [H], bf16, or None.
        input_scale: 0-d, fp32.
        weight_scale: 0-d, fp32.

    Returns:
        [..., H], bf16.
    """
    product = torch._scaled_mm(
        inputs.reshape(-1, inputs.shape[-1]),
        weight.t(),
        scale_a=input_scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product.reshape(*inputs.shape[:-1], len(weight))


def multiply_and_activate(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    activation: str,
    result_scale: Tensor,
    implementation: str = REFERENCE,
) -> Tensor:
    """Apply a linear layer and an activation, and quantise for the next layer.

    Args:
        inputs: see `multiply`.
        weight: see `multiply`.
        bias: see `multiply`.
        input_scale: see `multiply`.
        weight_scale: see `multiply`.
        activation: name in transformers' `ACT2FN`.
        result_scale: 0-d, fp32.
        implementation: a name of `FLOAT8_IMPLEMENTATIONS`.

    Returns:
        [..., H], e4m3.

    Raises:
        ValueError: the implementation is not loaded.
    """
    operation = choose(FLOAT8_IMPLEMENTATIONS, implementation)
    return operation(inputs, weight, bias, input_scale, weight_scale, activation, result_scale)


def _one_after_the_other(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    weight_scale: Tensor,
    activation: str,
    result_scale: Tensor,
) -> Tensor:
    """The reference, by PyTorch's own operations."""
    return quantise(ACT2FN[activation](multiply(inputs, weight, bias, input_scale, weight_scale)), result_scale)


FLOAT8_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, str, Tensor], Tensor]] = {
    REFERENCE: _one_after_the_other
}
"""What `multiply_and_activate` does, by name. `sf_mllm.ops.kernels` loads further ones."""
