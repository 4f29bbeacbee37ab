"""Self-attention over the packed projections of a few tokens."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sf_mllm.ops.implementations import REFERENCE, choose

_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""Of PyTorch on CUDA, the fastest for few tokens first. PyTorch's own first choice is cuDNN, whose gradients can be NaN
for 64 tokens (pytorch/pytorch#196678)."""


def attend(packed: Tensor, num_heads: int, implementation: str = REFERENCE) -> Tensor:
    """Mix tokens by multi-head self-attention.

    Args:
        packed: [B, T, 3 * D], queries, keys and values one after the other, in each the heads one after the other.
        num_heads: a divisor of D.
        implementation: a name of `ATTENTION_IMPLEMENTATIONS`.

    Returns:
        [B, T, D], heads one after the other.

    Raises:
        ValueError: the implementation is not loaded.
    """
    return choose(ATTENTION_IMPLEMENTATIONS, implementation)(packed, num_heads)


def _attend_by_sdpa(packed: Tensor, num_heads: int) -> Tensor:
    """The reference, by PyTorch's own operation."""
    query, key, value = packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    if packed.is_cuda:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, T, D / heads]
    else:
        mixed = F.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).flatten(2)


ATTENTION_IMPLEMENTATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {REFERENCE: _attend_by_sdpa}
"""Functions of the packed projections and the number of heads; by name. `sf_mllm.ops.kernels` loads further ones."""
