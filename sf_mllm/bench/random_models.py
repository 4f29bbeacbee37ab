"""Chat models with random weights: our encoder, or all patches of a ViT, in front of one language model.

Random weights cost what trained ones cost.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration


@dataclass(frozen=True)
class Size:
    """Shapes of encoder and decoder, and how long a row may be."""

    sparseformer: dict[str, Any]
    """Of our encoder."""
    image_size: int
    """That it reads, in pixels."""
    clip: dict[str, Any]
    """Of the ViT whose patches stock LLaVA reads."""
    llama: dict[str, Any]
    """Of the language model."""
    max_length: int
    """Tokens of a row, visual ones included."""
    text_scale: float = 1.0
    """Text lengths over those of the mix."""
    dtype: torch.dtype = torch.bfloat16
    """Of the frozen weights."""


SIZES = {
    "full": Size(
        sparseformer=SparseFormerConfig.from_name("sparseformer_btsp_openai_clip_large").to_dict(),
        image_size=224,
        clip={
            "image_size": 336,
            "patch_size": 14,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "hidden_act": "quick_gelu",
        },
        llama={
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
        max_length=2048,
    ),
    "tiny": Size(  # rehearses the measurement on a CPU
        sparseformer={
            "num_latents": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "stem_channels": 8,
            "focusing_size": 16,
            "focusing_num_attention_heads": 2,
            "focusing_repeats": 2,
            "num_sampling_points": 4,
            "focusing_mixing_size": 8,
            "sampling_mixing_size": 8,
        },
        image_size=32,
        clip={
            "image_size": 48,
            "patch_size": 8,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        llama={
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        max_length=128,
        text_scale=1 / 16,
        dtype=torch.float32,
    ),
}


def make_decoder(size: Size, device: torch.device) -> PreTrainedModel:
    """Return a random language model."""
    with device:
        return AutoModelForCausalLM.from_config(LlamaConfig(**size.llama), dtype=size.dtype)


def join_sparseformer(size: Size, decoder: PreTrainedModel, device: torch.device) -> SFLlavaForConditionalGeneration:
    """Return our model around a decoder; coordinates stay in float32."""
    vision_config = SparseFormerConfig(**size.sparseformer)
    config = SFLlavaConfig(
        vision_config=vision_config.to_dict(),
        text_config=decoder.config.to_dict(),
        image_token_index=size.llama["vocab_size"] - 1,
    )
    with device:
        tower = SparseFormerModel(vision_config)
    kept = tuple(tower._keep_in_fp32_modules_strict or ())
    for name, parameter in tower.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(size.dtype)
    with torch.device("meta"):
        model = SFLlavaForConditionalGeneration(config)
    return _put_together(model, tower, decoder, device)


def join_stock_llava(size: Size, decoder: PreTrainedModel, device: torch.device) -> LlavaForConditionalGeneration:
    """Return transformers' LLaVA, which takes every patch of a ViT, around a decoder."""
    vision_config = CLIPVisionConfig(**size.clip)
    config = LlavaConfig(
        vision_config=vision_config.to_dict(),
        text_config=decoder.config.to_dict(),
        image_token_index=size.llama["vocab_size"] - 1,
        image_seq_length=count_visual_tokens(size, "patches"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    tower: Any
    with device:
        tower = CLIPVisionModel(vision_config)
    tower.to(size.dtype)
    # Frozen as ours is: activation checkpointing would otherwise build a graph through it.
    tower.forward = torch.no_grad()(tower.forward)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return _put_together(model, tower, decoder, device)


def count_visual_tokens(size: Size, model: str) -> int:
    """Return the tokens of an image: all patches, or those of our encoder."""
    if model == "patches":
        return (size.clip["image_size"] // size.clip["patch_size"]) ** 2
    return SparseFormerConfig(**size.sparseformer).num_tokens


def _put_together(model: Any, tower: nn.Module, decoder: PreTrainedModel, device: torch.device) -> Any:
    model.model.vision_tower = tower
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    model.model.multi_modal_projector = LlavaMultiModalProjector(model.config).to(device)
    return model
