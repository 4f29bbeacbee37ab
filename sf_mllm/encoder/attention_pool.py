"""Pooling by attention, the head of SigLIP's ViTs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from sf_mllm.encoder.cortex import MLP


class AttentionPool(nn.Module):
    """One learned query reads all tokens; an MLP with a residual follows.

    A ViT makes its query from a latent and a linear layer. Both are constants, so their product is what is held here.

    Args:
        width: D.
        num_heads: attention heads, a divisor of D.
        hidden: width of the MLP.
        activation: name in transformers' `ACT2FN`.
        eps: of the layer norm before the MLP.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, width))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Reduce normalised tokens [B, T, D] to [B, D]."""
        query = self.query.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # [heads, 1, D / heads]
        key, value = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query.to(key.dtype).expand(len(key), -1, -1, -1), key, value)
        pooled = self.proj(mixed.flatten(1))  # [B, heads, 1, D / heads] -> [B, D]
        return pooled + self.mlp(self.norm(pooled))

    def reset_parameters(self) -> None:
        """Set the starting value of the query; its layers have theirs from the model."""
        init.trunc_normal_(self.query, std=1.0, a=-2.0, b=2.0)
