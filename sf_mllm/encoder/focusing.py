"""Focusing stage of the bootstrapped family: sample inside RoIs, decode, move the RoIs; then sample at full width."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.cortex import MLP, Attention, drop_path
from sf_mllm.encoder.mixing import AdaptiveMixing
from sf_mllm.encoder.sampler import RoiAdjustment, RoiSampler
from sf_mllm.ops.position import encode_rois
from sf_mllm.ops.roi import adjust_rois


class FocusingOutput(NamedTuple):
    """What a focusing stage hands on.

    `latents` [B, N, D]; `rois`: the initial ones [B, N, 4], then one entry per adjustment; `points`: [B, N, P, 2], one
    entry per sampling.
    """

    latents: Tensor
    rois: list[Tensor]
    points: list[Tensor]


def drop_path_rates(config: SparseFormerConfig) -> list[float]:
    """Stochastic depth of every block execution, in order: repeats of the focusing block, sampling block, cortex."""
    executions = config.focusing_repeats + 1 + config.num_hidden_layers
    return torch.linspace(0, config.drop_path_rate, executions, device="cpu").tolist()


class RoiCode(nn.Module):
    """Tells a token where its RoI is: a residual from the sinusoidal code."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.linear = nn.Linear(width, width)

    def forward(self, rois: Tensor) -> Tensor:
        """Map RoIs [B, N, 4] to residuals [B, N, D]."""
        code = encode_rois(rois, self.linear.in_features)
        return self.linear(self.norm(code.to(self.norm.weight.dtype)))


class FocusingBlock(GradientCheckpointingLayer):
    """Sample, tell the place, attend, think, adjust the RoIs; the same weights run several times."""

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        width, eps = config.focusing_size, config.focusing_layer_norm_eps
        self.sampler = RoiSampler(width, config.num_sampling_points, eps)
        self.mixing = AdaptiveMixing(
            width,
            config.stem_channels,
            config.num_sampling_points,
            config.focusing_mixing_size,
            config.padding_mode,
        )
        self.roi_code = RoiCode(width, eps)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, config.focusing_num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, 4 * width, config.focusing_hidden_act)
        self.roi_adjustment = RoiAdjustment(width, eps)

    def forward(
        self, features: Tensor, latents: Tensor, rois: Tensor, drop_path_rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return new latents [B, N, D], new RoIs [B, N, 4] and the points that were read, [B, N, P, 2].

        `latents` [B, N, D] and `rois` [B, N, 4] may have a batch size of 1 if all images share them; so have the points
        then.
        """
        points = self.sampler(latents, rois)
        latents = latents + drop_path(self.mixing(features, points, latents), drop_path_rate, self.training)
        latents = latents + self.roi_code(rois)
        latents = latents + drop_path(self.attn(self.norm1(latents)), drop_path_rate, self.training)
        latents = latents + drop_path(self.mlp(self.norm2(latents)), drop_path_rate, self.training)
        return latents, adjust_rois(rois, self.roi_adjustment(latents)), points


class SamplingBlock(GradientCheckpointingLayer):
    """Sample once more at the cortex's width and tell the place."""

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.focusing_layer_norm_eps
        self.sampler = RoiSampler(width, config.num_sampling_points, eps)
        self.mixing = AdaptiveMixing(
            width,
            config.stem_channels,
            config.num_sampling_points,
            config.sampling_mixing_size,
            config.padding_mode,
        )
        self.roi_code = RoiCode(width, eps)

    def forward(self, features: Tensor, latents: Tensor, rois: Tensor, drop_path_rate: float) -> tuple[Tensor, Tensor]:
        """Return new latents [B, N, D] and the points that were read [B, N, P, 2]."""
        points = self.sampler(latents, rois)
        latents = latents + drop_path(self.mixing(features, points, latents), drop_path_rate, self.training)
        return latents + self.roi_code(rois), points


class FocusingStage(nn.Module):
    """The whole stage: a narrow block run R times, a transition to the cortex's width, one wide sampling."""

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.drop_path_rates = drop_path_rates(config)[: config.focusing_repeats + 1]
        # With one repeat there is nothing to tell apart, and published models of that kind have no embedding.
        self.stage_embedding = (
            nn.Parameter(torch.empty(config.focusing_repeats, config.focusing_size))
            if config.focusing_repeats > 1
            else None
        )
        self.narrow = FocusingBlock(config)
        self.transition = (
            nn.Linear(config.focusing_size, config.hidden_size)
            if config.focusing_size != config.hidden_size
            else nn.Identity()
        )
        self.wide = SamplingBlock(config)

    def forward(self, features: Tensor, latents: Tensor, rois: Tensor) -> FocusingOutput:
        """Focus tokens [1, N, focusing_size] with RoIs [1, N, 4] on features [B, C, H, W].

        All images have the same tokens until they read features: what depends on nothing else is computed once.
        """
        batch_size = len(features)
        all_rois, all_points = [rois.expand(batch_size, -1, -1)], []
        for repeat, rate in enumerate(self.drop_path_rates[:-1]):
            if self.stage_embedding is not None:
                latents = latents + self.stage_embedding[repeat]
            latents, rois, points = self.narrow(features, latents, rois, rate)
            all_rois.append(rois)
            all_points.append(points.expand(batch_size, -1, -1, -1))
        latents, points = self.wide(features, self.transition(latents), rois, self.drop_path_rates[-1])
        return FocusingOutput(latents, all_rois, [*all_points, points])
