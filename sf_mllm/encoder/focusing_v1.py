"""Focusing stage of the v1 family: attend, adjust the RoIs, sample, think; twice, narrow and wide."""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.cortex import MLP, Attention, drop_path
from sf_mllm.encoder.focusing import FocusingOutput, drop_path_rates
from sf_mllm.encoder.mixing import AdaptiveMixingV1
from sf_mllm.encoder.sampler import RoiAdjustmentV1, RoiSampler
from sf_mllm.ops.roi import adjust_rois


class FocusingBlockV1(GradientCheckpointingLayer):
    """Attend, adjust the RoIs, sample inside them, think.

    Args:
        config: of the whole encoder.
        width: D of this block.
        num_heads: its attention heads.
        mixing_size: bottleneck of its mixing generator.
    """

    def __init__(self, config: SparseFormerConfig, width: int, num_heads: int, mixing_size: int) -> None:
        super().__init__()
        eps = config.focusing_layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads)
        self.roi_adjustment = RoiAdjustmentV1(width, eps)
        self.sampler = RoiSampler(width, config.num_sampling_points, eps)
        self.mixing = AdaptiveMixingV1(
            width, config.stem_channels, config.num_sampling_points, mixing_size, config.padding_mode
        )
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, 4 * width, config.focusing_hidden_act)

    def forward(
        self, features: Tensor, latents: Tensor, rois: Tensor, drop_path_rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return new latents [B, N, D], new RoIs [B, N, 4] and the points that were read [B, N, P, 2]."""
        latents = latents + drop_path(self.attn(self.norm1(latents)), drop_path_rate, self.training)
        rois = adjust_rois(rois, drop_path(self.roi_adjustment(latents), drop_path_rate, self.training))
        points = self.sampler(latents, rois)
        latents = latents + drop_path(self.mixing(features, points, latents), drop_path_rate, self.training)
        latents = latents + drop_path(self.mlp(self.norm2(latents)), drop_path_rate, self.training)
        return latents, rois, points


class FocusingStageV1(nn.Module):
    """The whole stage: a narrow block run R times, a transition to the cortex's width, a wide block run once."""

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.drop_path_rates = drop_path_rates(config)[: config.focusing_repeats + 1]
        self.narrow = FocusingBlockV1(
            config, config.focusing_size, config.focusing_num_attention_heads, config.focusing_mixing_size
        )
        self.transition = (
            nn.Sequential(
                nn.Linear(config.focusing_size, config.hidden_size),
                nn.LayerNorm(config.hidden_size, eps=config.focusing_layer_norm_eps),
            )
            if config.focusing_size != config.hidden_size
            else nn.Identity()
        )
        self.wide = FocusingBlockV1(config, config.hidden_size, config.num_attention_heads, config.sampling_mixing_size)

    def forward(self, features: Tensor, latents: Tensor, rois: Tensor) -> FocusingOutput:
        """Focus tokens [1, N, focusing_size] with RoIs [1, N, 4] on features [B, C, H, W]."""
        # Attention comes first here, and stochastic depth drops it for each image by itself.
        latents, rois = (tensor.expand(len(features), -1, -1) for tensor in (latents, rois))
        all_rois, all_points = [rois], []
        for rate in self.drop_path_rates[:-1]:
            latents, rois, points = self.narrow(features, latents, rois, rate)
            all_rois.append(rois)
            all_points.append(points)
        latents, rois, points = self.wide(features, self.transition(latents), rois, self.drop_path_rates[-1])
        return FocusingOutput(latents, [*all_rois, rois], [*all_points, points])
