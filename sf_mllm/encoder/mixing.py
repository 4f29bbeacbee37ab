"""Adaptive mixing: each token generates the matrices that decode its own sampled features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sf_mllm.encoder.layers import MatrixGenerator, UnitLayerNorm

MINIMUM_OUTPUT_POINTS = 32


class _AdaptiveMixing(nn.Module):
    """Generator of the two matrices and the output projection; the families differ in what stands between.

    Args:
        width: D, of the tokens.
        channels: C, of the sampled features.
        num_points: P; fewer than 32 points are expanded to Q = 32.
        inner_size: bottleneck of the generator.
    """

    def __init__(self, width: int, channels: int, num_points: int, inner_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.num_points = num_points
        self.num_output_points = max(num_points, MINIMUM_OUTPUT_POINTS)
        # 1e-5 whatever the family's own epsilon is: published weights were trained so.
        self.norm = UnitLayerNorm(width, eps=1e-5)
        self.squeeze = nn.Linear(width, inner_size)
        self.generate = MatrixGenerator(inner_size, channels, num_points, self.num_output_points)
        self.out = nn.Linear(self.num_output_points * channels, width)

    def generate_matrices(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the channel matrix [B, N, C, C] (rows: input) and the point matrix [B, N, Q, P] (rows: output)."""
        parameters = self.generate(self.squeeze(self.norm(latents)))
        channel, point = parameters.split([self.channels**2, self.num_output_points * self.num_points], dim=-1)
        channel_matrix = channel.unflatten(-1, (self.channels, self.channels))
        point_matrix = point.unflatten(-1, (self.num_output_points, self.num_points))
        return channel_matrix, point_matrix


class AdaptiveMixing(_AdaptiveMixing):
    """Adaptive mixing of the bootstrapped family: GELU(S (X M)).

    Source: arXiv 2312.01987; official adaptive_mixing without biases.
    """

    def forward(self, sampled: Tensor, latents: Tensor) -> Tensor:
        """Decode sampled features [B, N, P, C] for tokens [B, N, D]: a residual [B, N, D]."""
        channel_matrix, point_matrix = self.generate_matrices(latents)
        mixed = F.gelu(point_matrix @ (sampled @ channel_matrix))  # [B, N, Q, C]
        return self.out(mixed.flatten(-2))


class AdaptiveMixingV1(_AdaptiveMixing):
    """Adaptive mixing of the v1 family: GELU(S GELU(X M + channel bias) + point bias).

    Source: arXiv 2304.03768, section 3.2.
    """

    def __init__(self, width: int, channels: int, num_points: int, inner_size: int) -> None:
        super().__init__(width, channels, num_points, inner_size)
        self.channel_bias = nn.Parameter(torch.zeros(channels))
        self.point_bias = nn.Parameter(torch.zeros(self.num_output_points))

    def forward(self, sampled: Tensor, latents: Tensor) -> Tensor:
        """Decode sampled features [B, N, P, C] for tokens [B, N, D]: a residual [B, N, D]."""
        channel_matrix, point_matrix = self.generate_matrices(latents)
        mixed = F.gelu(sampled @ channel_matrix + self.channel_bias)  # [B, N, P, C]
        mixed = F.gelu(point_matrix @ mixed + self.point_bias[:, None])  # [B, N, Q, C]
        return self.out(mixed.flatten(-2))
