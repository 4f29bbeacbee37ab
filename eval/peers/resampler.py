"""Learnt queries that read the patches by cross-attention.

Source: the position-aware adapter of Qwen-VL (arXiv 2308.12966): queries of normal start (std 0.02), keys and queries
with fixed 2D sine positions of one frame, norms on both sides. Its single attention is here followed by a second one
and each by a feed-forward layer, as in the perceiver resampler of Flamingo (arXiv 2204.14198), which reads more.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from eval.peers.grid import side_of_grid
from sf_mllm.errors import InputError


class Resampler(nn.Module):
    """A quarter as many queries as patches, spread over the image by their positions.

    Args:
        width: D of the patches.
        num_patches: N of them, a square grid.
        out_width: D' of queries and attention, the language model's width as in Qwen-VL; divisible by 4 and `heads`.
        heads: of the attention.
        layers: cross-attentions.

    Raises:
        InputError: the widths do not fit.
    """

    def __init__(self, width: int, num_patches: int, *, out_width: int, heads: int, layers: int = 2) -> None:
        super().__init__()
        if out_width % 4 or out_width % heads:
            raise InputError(f"A resampler of width {out_width} is not possible; it must divide by 4 and by {heads}.")
        side = side_of_grid(num_patches, 2)
        self.out_width, self.num_tokens = out_width, num_patches // 4
        self.queries = nn.Parameter(torch.empty(self.num_tokens, out_width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.keys = nn.Linear(width, out_width, bias=False)
        self.norm_keys = nn.LayerNorm(out_width)
        self.layers = nn.ModuleList(ResamplerLayer(out_width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(out_width)
        positions = build_sincos2d_pos_embed([math.isqrt(self.num_tokens)] * 2, out_width)  # [M, D']
        stretched = F.interpolate(
            positions.T.unflatten(1, (side // 2, side // 2))[None], size=(side, side), mode="bicubic"
        )
        self.register_buffer("query_positions", positions, persistent=False)
        self.register_buffer("key_positions", stretched[0].flatten(1).T.contiguous(), persistent=False)  # [N, D']

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, D] -> [B, N/4, D']."""
        values = self.norm_keys(self.keys(patches))  # [B, N, D']
        queries = self.queries.expand(len(patches), -1, -1)  # [B, M, D']
        for layer in self.layers:
            queries = layer(queries, values, self.query_positions, self.key_positions)
        return self.norm(queries)


class ResamplerLayer(nn.Module):
    """Cross-attention and feed-forward, each added to the queries."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, values: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Let queries [B, M, D'] read values [B, N, D']; positions are added where they are compared, not to values."""
        asked = self.norm_queries(queries) + query_positions
        read, _ = self.attention(asked, values + key_positions, values, need_weights=False)
        queries = queries + read
        return queries + self.feed_forward(queries)
