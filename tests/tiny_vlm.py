"""Tiny random models, for tests."""

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config, set_seed

from sf_mllm.data.chat import stop_token
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.vlm.build import build_sf_llava
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor
from tests.encoder.tiny import tiny_config
from tests.tiny_text import make_tokenizer

DECODER_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
NUM_TOKENS = 6
"""Visual tokens of the tiny encoder: five latents and the class token."""


def make_encoder(**overrides) -> SparseFormerModel:
    config = tiny_config(**{"num_latents": NUM_TOKENS - 1, **overrides})
    set_seed(0)
    return SparseFormerModel(config).eval()


def make_decoder(family: str = "llama", *, vocab_size: int, tied: bool = False) -> PreTrainedModel:
    config = DECODER_CONFIGS[family](
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large enough for the answers of random weights to differ
    )
    set_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def make_image_processor() -> SparseFormerImageProcessor:
    return SparseFormerImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_sf_llava(
    family: str = "llama", *, template: str = "qwen2.5", tied: bool = False, **encoder_overrides
) -> tuple[SFLlavaForConditionalGeneration, SFLlavaProcessor]:
    tokenizer = make_tokenizer(template)
    model, processor = build_sf_llava(
        make_encoder(**encoder_overrides),
        make_image_processor(),
        make_decoder(family, vocab_size=len(tokenizer), tied=tied),
        tokenizer,
        chat_template=tokenizer.chat_template,
        stop_token=stop_token(tokenizer),
    )
    return model.eval(), processor


def make_image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Smooth coloured noise, so that a shift of the regions changes what they read."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=size[::-1], mode="bilinear")
    return Image.fromarray((fine[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy())
