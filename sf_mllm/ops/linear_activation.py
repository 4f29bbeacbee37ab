"""A linear layer and the activation behind it, the first half of an MLP."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from sf_mllm.ops.implementations import REFERENCE, choose


def linear_activation(
    tokens: Tensor, weight: Tensor, bias: Tensor, activation: str, implementation: str = REFERENCE
) -> Tensor:
    """Multiply by a matrix, add a bias, apply an activation; under autocast in its precision.

    Args:
        tokens: [..., D].
        weight: [H, D].
        bias: [H].
        activation: name in transformers' `ACT2FN`.
        implementation: a name of `LINEAR_ACTIVATION_IMPLEMENTATIONS`.

    Returns:
        [..., H].

    Raises:
        ValueError: the implementation is not loaded.
    """
    return choose(LINEAR_ACTIVATION_IMPLEMENTATIONS, implementation)(tokens, weight, bias, activation)


def _one_after_the_other(tokens: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The reference, by PyTorch's own operations."""
    return ACT2FN[activation](F.linear(tokens, weight, bias))


LINEAR_ACTIVATION_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    REFERENCE: _one_after_the_other
}
"""Functions of tokens, weight, bias and an activation's name; by name. `sf_mllm.ops.kernels` loads further ones."""
