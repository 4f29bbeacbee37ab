"""Adaptive mixing: each token generates the matrices that decode its own sampled features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sf_mllm.encoder.layers import MatrixGenerator, UnitLayerNorm
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.mixing import sample_and_mix, split_matrices
from sf_mllm.ops.sampling import sample_points

MINIMUM_OUTPUT_POINTS = 32


class _AdaptiveMixing(nn.Module):
    """Generator of the two matrices and the output projection; the families differ in what stands between.

    Args:
        width: D, of the tokens.
        channels: C, of the sampled features.
        num_points: P; fewer than 32 points are expanded to Q = 32.
        inner_size: bottleneck of the generator.
        padding_mode: what a point outside the image reads.

    Attributes:
        kernels: see `SparseFormerModel.set_kernels`.
    """

    def __init__(self, width: int, channels: int, num_points: int, inner_size: int, padding_mode: str) -> None:
        super().__init__()
        self.kernels = REFERENCE
        self.padding_mode = padding_mode
        self.channels = channels
        self.num_points = num_points
        self.num_output_points = max(num_points, MINIMUM_OUTPUT_POINTS)
        # 1e-5 whatever the family's own epsilon is: published weights were trained so.
        self.norm = UnitLayerNorm(width, eps=1e-5)
        self.squeeze = nn.Linear(width, inner_size)
        self.generate = MatrixGenerator(inner_size, channels, num_points, self.num_output_points)
        self.out = nn.Linear(self.num_output_points * channels, width)

    def generate_parameters(self, latents: Tensor) -> Tensor:
        """Return both matrices of tokens [B, N, D] as `split_matrices` reads them, [B, N, C * C + Q * P]."""
        return self.generate(self.squeeze(self.norm(latents)))


class AdaptiveMixing(_AdaptiveMixing):
    """Adaptive mixing of the bootstrapped family: GELU(S (X M))."""

    def forward(self, features: Tensor, points: Tensor, latents: Tensor) -> Tensor:
        """Decode features [B, C, H, W] at points [B, N, P, 2] for tokens [B, N, D]: a residual [B, N, D].

        The batch size of points and tokens may be 1: they are those of all images then.
        """
        mixed = sample_and_mix(
            features,
            points,
            self.generate_parameters(latents),
            padding_mode=self.padding_mode,
            implementation=self.kernels,
        )
        return self.out(mixed.flatten(-2))


class AdaptiveMixingV1(_AdaptiveMixing):
    """Adaptive mixing of the v1 family: GELU(S GELU(X M + channel bias) + point bias).

    Source: arXiv 2304.03768, section 3.2.
    """

    def __init__(self, width: int, channels: int, num_points: int, inner_size: int, padding_mode: str) -> None:
        super().__init__(width, channels, num_points, inner_size, padding_mode)
        self.channel_bias = nn.Parameter(torch.zeros(channels))
        self.point_bias = nn.Parameter(torch.zeros(self.num_output_points))

    def forward(self, features: Tensor, points: Tensor, latents: Tensor) -> Tensor:
        """Decode features [B, C, H, W] at points [B, N, P, 2] for tokens [B, N, D]: a residual [B, N, D]."""
        sampled = sample_points(features, points, padding_mode=self.padding_mode, implementation=self.kernels)
        channel_matrix, point_matrix = split_matrices(self.generate_parameters(latents), self.channels, self.num_points)
        mixed = F.gelu(sampled @ channel_matrix + self.channel_bias)  # [B, N, P, C]
        mixed = F.gelu(point_matrix @ mixed + self.point_bias[:, None])  # [B, N, Q, C]
        return self.out(mixed.flatten(-2))
