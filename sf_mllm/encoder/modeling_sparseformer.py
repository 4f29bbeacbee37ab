"""SparseFormer encoder: stem -> focusing -> cortex -> norm and projection."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Self

from sf_mllm.encoder.attention_pool import AttentionPool
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.cortex import MLP, Attention, CortexBlock
from sf_mllm.encoder.focusing import FocusingStage, drop_path_rates
from sf_mllm.encoder.focusing_v1 import FocusingStageV1
from sf_mllm.encoder.layers import MatrixGenerator, UnitLayerNorm, ZeroStartLinear
from sf_mllm.encoder.mixing import AdaptiveMixing, AdaptiveMixingV1
from sf_mllm.encoder.sampler import InitialLatents, RoiSampler
from sf_mllm.encoder.stem import Stem, StemConvolution
from sf_mllm.encoder.strict_loading import StrictLoadingMixin
from sf_mllm.ops.roi import ROI_LAYOUTS

if TYPE_CHECKING:
    from sf_mllm.encoder.weights_vit import InheritanceReport

FOCUSING_STAGES: dict[str, type[nn.Module]] = {"bootstrapped": FocusingStage, "v1": FocusingStageV1}


@dataclass
class SparseFormerOutput(ModelOutput):
    """Output of `SparseFormerModel`; the same fields whatever the model.

    Attributes:
        last_hidden_state: [B, N(+1), D], tokens after the final norm, class token first where there is one.
        pooler_output: [B, projection_size], for CLIP models the (not normalised) embedding of the image, for
            classifiers the logits of the classes that `config.id2label` names.
        rois: [B, steps, N, 4], fp32, (x1, y1, x2, y2) relative to the image: the initial RoIs, then one entry per
            adjustment. They may leave the image.
        hidden_states: on request, cortex input and the output of every cortex block, [B, N(+1), D] each, the last one
            normalised: `hidden_states[-1]` is `last_hidden_state`.
        sampling_points: on request, one [B, N, P, 2] per sampling, fp32, (x, y) relative to the image.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    rois: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    sampling_points: tuple[Tensor, ...] | None = None


class SparseFormerModel(StrictLoadingMixin, PreTrainedModel):
    """Image encoder with a fixed number of tokens, each with a region of interest that moves over the image.

    Example:
        >>> model = SparseFormerModel(SparseFormerConfig.from_name("sparseformer_btsp_openai_clip_base"))
        >>> model(torch.randn(1, 3, 224, 320)).last_hidden_state.shape
        torch.Size([1, 49, 768])
    """

    config_class = SparseFormerConfig
    base_model_prefix = "sparseformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # transformers assigns tuples too
    supports_gradient_checkpointing = True
    # Attention over at most a few hundred tokens always runs through PyTorch's SDPA, which picks the kernel itself, so
    # whatever implementation a user asks for the language model is fine here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["FocusingBlock", "FocusingBlockV1", "SamplingBlock", "CortexBlock"]
    _keep_in_fp32_modules_strict = {"rois"}
    # What a LLaVA-style directory holds beside its vision tower.
    _keys_to_ignore_on_load_unexpected = [
        r"^model\.language_model\.",
        r"^model\.multi_modal_projector\.",
        r"^lm_head\.",
    ]

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__(config)
        rates = drop_path_rates(config)[config.focusing_repeats + 1 :]
        self.stem = Stem(config.stem_channels)
        self.initial = InitialLatents(config.num_latents, config.focusing_size, config.shared_latent_embedding)
        self.focusing = FOCUSING_STAGES[config.family](config)
        self.cls_token = nn.Parameter(torch.empty(1, config.hidden_size)) if config.use_cls_token else None
        self.cortex = nn.ModuleList(
            CortexBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.hidden_act,
                config.layer_norm_eps,
                rate,
            )
            for rate in rates
        )
        self.norm: nn.Module = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else nn.Identity()
        )
        self.attention_pool = (
            AttentionPool(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.hidden_act,
                config.layer_norm_eps,
            )
            if config.pooling == "attention"
            else None
        )
        self.projection = (
            nn.Linear(config.hidden_size, config.projection_size, bias=config.projection_bias)
            if config.projection_size is not None
            else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_sampling_points: bool = False,
    ) -> SparseFormerOutput:
        """Encode images.

        Args:
            pixel_values: [B, 3, H, W], normalised; any height and width, any floating dtype.
            output_hidden_states: fill `hidden_states`. Layer numbers, which transformers' LLaVA passes, mean yes.
            output_sampling_points: fill `sampling_points`.

        Raises:
            ValueError: `pixel_values` is not [B, 3, H, W].
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be [batch, 3, height, width], got {tuple(pixel_values.shape)}.")
        features = self.stem(pixel_values.to(self.stem.conv.weight.dtype))
        latents, all_rois, all_points = self.focusing(features, *self.initial())

        tokens = latents
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(latents), 1, -1).to(latents.dtype), latents], dim=1)
        states = [tokens]
        for block in self.cortex:
            tokens = block(tokens)
            states.append(tokens)
        normed = self.norm(tokens)
        states[-1] = normed

        wants_states = output_hidden_states is not None and output_hidden_states is not False
        return SparseFormerOutput(
            last_hidden_state=normed,
            pooler_output=self.projection(self.pool(tokens, normed)),
            rois=torch.stack(all_rois, dim=1),
            hidden_states=tuple(states) if wants_states else None,
            sampling_points=tuple(all_points) if output_sampling_points else None,
        )

    def pool(self, tokens: Tensor, normed: Tensor) -> Tensor:
        """Reduce tokens before and after the final norm, both [B, N(+1), D], to [B, D] as `config.pooling` says."""
        if self.config.pooling == "cls":
            return normed[:, 0]
        first_latent = int(self.config.use_cls_token)
        if self.attention_pool is not None:
            return self.attention_pool(normed[:, first_latent:])
        if self.config.pooling == "norm_then_mean":
            return normed[:, first_latent:].mean(dim=1)
        return self.norm(tokens[:, first_latent:].mean(dim=1))

    def set_kernels(self, name: str) -> None:
        """Choose what computes the stem, sampling, mixing, attention and MLPs; results differ in rounding.

        Args:
            name: "torch", PyTorch's own operations, where a model starts; or "triton", kernels for CUDA devices. It
                does not go into saved files.

        Raises:
            InputError: there is no such implementation, or it cannot be had here.
        """
        # Imported where it is used: a model that stands without this package has the reference only.
        from sf_mllm.ops.kernels import load_kernels

        load_kernels(name)
        for module in self.modules():
            if isinstance(module, StemConvolution | AdaptiveMixing | AdaptiveMixingV1 | Attention | MLP):
                module.kernels = name

    @property
    def kernels(self) -> str:
        """What `set_kernels` has chosen."""
        return self.stem.conv.kernels

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Return None: there is no embedding of inputs, and activation checkpointing must not hook the stem."""
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers visits only modules that own parameters themselves, so starting values belong to the owner.
        if isinstance(module, UnitLayerNorm | ZeroStartLinear | MatrixGenerator | RoiSampler | AttentionPool):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            bound = 1 / math.sqrt(module.weight[0].numel())
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, InitialLatents):
            init.trunc_normal_(module.embedding, std=1.0, a=-2.0, b=2.0)
            init.copy_(module.rois, ROI_LAYOUTS[self.config.initial_roi_layout](self.config.num_latents))
        elif isinstance(module, FocusingStage) and module.stage_embedding is not None:
            init.normal_(module.stage_embedding)
        elif isinstance(module, AdaptiveMixingV1):
            init.zeros_(module.channel_bias)
            init.zeros_(module.point_bias)
        elif isinstance(module, SparseFormerModel) and module.cls_token is not None:
            init.normal_(module.cls_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load an encoder directory, or the vision tower of a LLaVA-style directory.

        Raises:
            InputError: keys are missing, left over or of another shape.
        """
        saved, _ = SparseFormerConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "vision_config" in saved:
            kwargs.setdefault("key_mapping", {r"^model\.vision_tower\.": ""})
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, always under the encoder's own names.

        By default transformers would write a tower taken out of a LLaVA-style directory under the names it had there.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    @classmethod
    def from_vit(
        cls, teacher: nn.Module, *, start_from_class_token: bool = True, **overrides: Any
    ) -> "tuple[Self, InheritanceReport]":
        """Build a student that inherits the last blocks and the head of a ViT.

        The head is the final norm, the attention pool of teachers that have one, and the projection or classifier; the
        names of a classifier's classes become `config.id2label`.

        Args:
            teacher: an open_clip CLIP model, its `visual`, or a timm `VisionTransformer` or `Eva`.
            start_from_class_token: start the class token from the teacher's (with its position, after its pre-norm)
                instead of noise.
            **overrides: fields of `SparseFormerConfig` that do not follow the teacher, for example `num_latents`,
                `num_hidden_layers`, `focusing_size`.

        Returns:
            The student, in training mode, and a report of what was copied, what is new, what was left out.

        Raises:
            InputError: the teacher has a part that cannot be inherited, or an override contradicts the teacher.
        """
        # Imported where it is used: an encoder that is loaded needs nothing of it (see sf_mllm/remote_code.py).
        from sf_mllm.encoder.weights_vit import config_for_vit, describe_vit, inherit_weights

        description = describe_vit(teacher)
        model = cls(config_for_vit(description, overrides))
        report = inherit_weights(model, description, start_from_class_token=start_from_class_token)
        return model.train(), report
