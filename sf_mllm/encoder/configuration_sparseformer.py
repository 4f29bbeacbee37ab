"""Configuration of a SparseFormer encoder: describes weights and ships with them, holds no run settings."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from sf_mllm.encoder.published import published_config
from sf_mllm.errors import InputError, nearest
from sf_mllm.ops.roi import ROI_LAYOUTS

_COUNTS = (
    *("num_latents", "stem_channels", "focusing_repeats", "focusing_mixing_size", "sampling_mixing_size"),
    *("num_hidden_layers", "intermediate_size", "projection_size"),
)


@strict
class SparseFormerConfig(PreTrainedConfig):
    """Sizes and choices of a SparseFormer.

    Attributes:
        family: "bootstrapped" (arXiv 2312.01987) or "v1" (arXiv 2304.03768); they order and build the focusing stage
            differently.
        stem_channels: C, channels of the feature map that tokens sample.
        num_latents: N, tokens with a region of interest.
        shared_latent_embedding: all latent tokens start from one embedding and differ by their regions only.
        initial_roi_layout: "distinct_grid" or "official_grid"; only the start of a new model.
        focusing_size: width of the repeated focusing block.
        focusing_repeats: how often it runs.
        focusing_num_attention_heads: its attention heads.
        focusing_hidden_act: activation of its MLP.
        focusing_layer_norm_eps: of all norms before the cortex, except those inside the mixing generator.
        num_sampling_points: P, points that a token reads in one sampling.
        focusing_mixing_size: bottleneck of the mixing generator in the repeated block.
        sampling_mixing_size: the same in the block that samples at full width.
        padding_mode: "border" or "zeros", what a point outside the image reads.
        hidden_size: D, width of the cortex and of the tokens that come out.
        num_hidden_layers: cortex blocks.
        num_attention_heads: attention heads of the cortex (and of the full-width sampling block of v1).
        intermediate_size: hidden width of the cortex MLPs.
        hidden_act: activation of the cortex MLPs; weights of OpenAI's CLIP need "quick_gelu".
        layer_norm_eps: of the cortex and the final norm.
        use_cls_token: a class token joins the latent tokens at the cortex.
        final_norm: the tokens that come out are normalised; false for the few ViTs without such a norm.
        pooling: "cls" (class token of the normalised tokens), "mean_then_norm" or "norm_then_mean" (of the latents), or
            "attention" (a learned query reads the normalised latents).
        projection_size: width of `pooler_output`; None leaves it at D without a projection. In a classifier these are
            logits, and `id2label` names them.
        projection_bias: the projection has a bias (classifiers do, CLIP does not).
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all executions.
    """

    model_type = "sparseformer"
    base_config_key = "vision_config"

    family: Literal["bootstrapped", "v1"] = "bootstrapped"
    stem_channels: int = 64
    num_latents: int = 48
    shared_latent_embedding: bool = True
    initial_roi_layout: str = "distinct_grid"
    focusing_size: int = 384
    focusing_repeats: int = 4
    focusing_num_attention_heads: int = 6
    focusing_hidden_act: str = "gelu"
    focusing_layer_norm_eps: float = 1e-5
    num_sampling_points: int = 16
    focusing_mixing_size: int = 128
    sampling_mixing_size: int = 128
    padding_mode: Literal["border", "zeros"] = "border"
    hidden_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    use_cls_token: bool = True
    final_norm: bool = True
    pooling: Literal["cls", "mean_then_norm", "norm_then_mean", "attention"] = "cls"
    projection_size: int | None = 512
    projection_bias: bool = False
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Not a `validate_...` method: transformers would wrap the InputError in an exception of its own.
        self._refuse_impossible_sizes()

    def _refuse_impossible_sizes(self) -> None:
        if self.initial_roi_layout not in ROI_LAYOUTS:
            raise InputError(
                f"initial_roi_layout '{self.initial_roi_layout}' is unknown."
                f"{nearest(self.initial_roi_layout, ROI_LAYOUTS)} Allowed: {', '.join(sorted(ROI_LAYOUTS))}."
            )
        if self.initial_roi_layout == "official_grid" and self.num_latents < 4:
            raise InputError(f"initial_roi_layout 'official_grid' needs at least 4 latents, got {self.num_latents}.")
        for name in ("focusing_hidden_act", "hidden_act"):
            activation = getattr(self, name)
            if activation not in ACT2FN:
                raise InputError(
                    f"{name} '{activation}' is no activation of transformers.{nearest(activation, ACT2FN)}"
                )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        for name in ("focusing_layer_norm_eps", "layer_norm_eps"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.num_sampling_points < 2:
            raise InputError(
                f"num_sampling_points must be at least 2 (offsets are normalised by their spread), "
                f"got {self.num_sampling_points}."
            )
        for width_name, heads_name in (
            ("focusing_size", "focusing_num_attention_heads"),
            ("hidden_size", "num_attention_heads"),
        ):
            width, heads = getattr(self, width_name), getattr(self, heads_name)
            if heads < 1 or width % heads:
                raise InputError(f"{heads_name}={heads} must divide {width_name}={width}.")
            if self.family == "bootstrapped" and (width % 4 or width < 8):
                raise InputError(f"{width_name} must be a multiple of 4 and at least 8 (RoI code), got {width}.")
        if self.pooling == "cls" and not self.use_cls_token:
            raise InputError("pooling 'cls' needs use_cls_token=True; without it choose a mean or attention pooling.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise InputError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}.")

    @property
    def num_tokens(self) -> int:
        """Tokens that an image becomes: latent tokens plus the class token if there is one."""
        return self.num_latents + int(self.use_cls_token)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "SparseFormerConfig":
        """Return the configuration of a published checkpoint.

        Args:
            name: for example "sparseformer_btsp_openai_clip_large".
            **overrides: fields to change.

        Raises:
            InputError: no published checkpoint has that name.
        """
        return cls(**{**published_config(name), **overrides})
