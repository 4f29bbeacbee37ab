"""Tiny encoders with every path alive."""

from typing import Any

import torch

from sf_mllm import SparseFormerConfig, SparseFormerModel

_BOOTSTRAPPED = {
    "stem_channels": 8,
    "num_latents": 5,
    "focusing_size": 16,
    "focusing_repeats": 2,
    "focusing_num_attention_heads": 2,
    "num_sampling_points": 9,
    "focusing_mixing_size": 8,
    "sampling_mixing_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "projection_size": 6,
}
_V1 = {
    "shared_latent_embedding": False,
    "padding_mode": "zeros",
    "hidden_act": "gelu",
    "use_cls_token": False,
    "pooling": "mean_then_norm",
    "projection_bias": True,
}


def tiny_config(family: str = "bootstrapped", **changes: Any) -> SparseFormerConfig:
    """About 100 k parameters."""
    return SparseFormerConfig(**{**_BOOTSTRAPPED, **(_V1 if family == "v1" else {}), "family": family, **changes})


def tiny_model(family: str = "bootstrapped", **changes: Any) -> SparseFormerModel:
    """An encoder in eval mode whose zero-initialised weights are filled, so that regions move and tokens differ."""
    torch.manual_seed(0)
    model = SparseFormerModel(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.05)
    return model
