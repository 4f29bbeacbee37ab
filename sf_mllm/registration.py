"""Tie our configurations and models to the transformers Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration, SFLlavaModel
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor


def register_auto_classes() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoImageProcessor`, `AutoProcessor`, ... know our types; safe to call twice."""
    AutoConfig.register(SparseFormerConfig.model_type, SparseFormerConfig, exist_ok=True)
    AutoConfig.register(SFLlavaConfig.model_type, SFLlavaConfig, exist_ok=True)
    AutoModel.register(SparseFormerConfig, SparseFormerModel, exist_ok=True)
    AutoModel.register(SFLlavaConfig, SFLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(SFLlavaConfig, SFLlavaForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        SparseFormerConfig, image_processor_classes={"torchvision": SparseFormerImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(SFLlavaConfig, SFLlavaProcessor, exist_ok=True)
