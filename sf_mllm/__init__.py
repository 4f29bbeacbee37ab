"""A LLaVA-style model that reads an image in 49-64 tokens.

Public names load on first use, so that importing the package costs nothing and `--help` answers at once.

Shape letters used throughout: B batch, N latent tokens, P sampling points per token, D encoder width, C stem channels,
H W feature map, T text length, E language-model width, V vocabulary, I images in a batch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
    from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
    from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel, SparseFormerOutput
    from sf_mllm.encoder.open_clip_tower import replace_visual
    from sf_mllm.encoder.quantization import quantize_cortex
    from sf_mllm.encoder.weights_official import load_official_checkpoint
    from sf_mllm.registration import register_auto_classes
    from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
    from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration, SFLlavaModel
    from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

_MODULE_OF = {
    "SparseFormerConfig": "sf_mllm.encoder.configuration_sparseformer",
    "SparseFormerImageProcessor": "sf_mllm.encoder.image_processing_sparseformer",
    "SparseFormerModel": "sf_mllm.encoder.modeling_sparseformer",
    "SparseFormerOutput": "sf_mllm.encoder.modeling_sparseformer",
    "replace_visual": "sf_mllm.encoder.open_clip_tower",
    "quantize_cortex": "sf_mllm.encoder.quantization",
    "load_official_checkpoint": "sf_mllm.encoder.weights_official",
    "register_auto_classes": "sf_mllm.registration",
    "SFLlavaConfig": "sf_mllm.vlm.configuration_sf_llava",
    "SFLlavaForConditionalGeneration": "sf_mllm.vlm.modeling_sf_llava",
    "SFLlavaModel": "sf_mllm.vlm.modeling_sf_llava",
    "SFLlavaProcessor": "sf_mllm.vlm.processing_sf_llava",
}

__all__ = [
    "SFLlavaConfig",
    "SFLlavaForConditionalGeneration",
    "SFLlavaModel",
    "SFLlavaProcessor",
    "SparseFormerConfig",
    "SparseFormerImageProcessor",
    "SparseFormerModel",
    "SparseFormerOutput",
    "load_official_checkpoint",
    "quantize_cortex",
    "register_auto_classes",
    "replace_visual",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first access (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sf_mllm' has no attribute '{name}'")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
