"""The seven published configurations, as keyword arguments of `SparseFormerConfig`.

Source: configurations of the official repository (showlab/sparseformer, MIT).
"""

from typing import Any

from sf_mllm.errors import InputError, nearest


def _v1(num_latents: int, focusing_size: int, hidden_size: int, num_hidden_layers: int, drop: float) -> dict[str, Any]:
    return {
        "family": "v1",
        "stem_channels": 96,
        "num_latents": num_latents,
        "shared_latent_embedding": False,
        "initial_roi_layout": "official_grid",
        "focusing_size": focusing_size,
        "focusing_num_attention_heads": 64,
        "focusing_layer_norm_eps": 1e-6,
        "num_sampling_points": 36,
        "focusing_mixing_size": focusing_size // 4,
        "sampling_mixing_size": hidden_size // 4,
        "padding_mode": "zeros",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 64,
        "intermediate_size": 4 * hidden_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "use_cls_token": False,
        "pooling": "mean_then_norm",
        "projection_size": 1000,
        "projection_bias": True,
        "drop_path_rate": drop,
    }


def _bootstrapped(
    num_latents: int, hidden_size: int, num_hidden_layers: int, activation: str, projection_size: int
) -> dict[str, Any]:
    focusing_size = {768: 384, 1024: 512}[hidden_size]
    return {
        "num_latents": num_latents,
        "initial_roi_layout": "official_grid",
        "focusing_size": focusing_size,
        "focusing_num_attention_heads": focusing_size // 64,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 64,
        "intermediate_size": 4 * hidden_size,
        "hidden_act": activation,
        "projection_size": projection_size,
        "projection_bias": projection_size == 1000,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "sparseformer_v1_tiny": _v1(49, 256, 512, 7, 0.2),
    "sparseformer_v1_small": _v1(64, 320, 640, 7, 0.3),
    "sparseformer_v1_base": _v1(81, 384, 768, 9, 0.4),
    "sparseformer_btsp_augreg_base": _bootstrapped(48, 768, 8, "gelu", 1000),
    "sparseformer_btsp_augreg_large": _bootstrapped(48, 1024, 16, "gelu", 1000),
    "sparseformer_btsp_openai_clip_base": _bootstrapped(48, 768, 8, "quick_gelu", 512),
    "sparseformer_btsp_openai_clip_large": _bootstrapped(63, 1024, 16, "quick_gelu", 768),
}


def published_config(name: str) -> dict[str, Any]:
    """Return the arguments of a published configuration.

    Raises:
        InputError: no published checkpoint has that name.
    """
    if name not in PUBLISHED:
        raise InputError(
            f"No published SparseFormer is named '{name}'.{nearest(name, PUBLISHED)} "
            f"Published: {', '.join(sorted(PUBLISHED))}."
        )
    return PUBLISHED[name]
