from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sf_mllm.config import load_run_config
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.parts import join
from sf_mllm.vlm.adapters import PROJECTOR, add_adapters
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_image_processor

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "finetune").rglob("*.yaml"))
FILLED_IN = ["encoder=somewhere", "decoder=some/decoder", "data.conversations=some.json"]

# The published shapes of the decoders that the configurations name.
DECODERS = {
    "vicuna_7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "qwen2_5_0_5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
# LoRA of rank 128 on a linear layer adds 128 x (inputs + outputs).
ADAPTERS = {
    "vicuna_7b": 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008)),
    "qwen2_5_0_5b": 24 * 128 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864)),
}


def test_every_finetune_config_is_covered():
    phases = [name + phase for name in sorted(DECODERS) for phase in ("", "_align")]
    assert sorted(path.stem for path in CONFIGS) == ["demo", "demo_align", "demo_model", *phases]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_finetune_config_parses(path, tmp_path):
    config = load_run_config(InstructConfig, path, FILLED_IN)
    arguments = make_training_arguments(config.train, tmp_path, config.seed)
    assert len(path.read_text().splitlines()) <= 40
    if path.stem in DECODERS:  # LLaVA-1.5's recipe
        assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 128
        assert (arguments.learning_rate, config.projector_learning_rate) == (2e-4, 2e-5)
        assert (config.lora.rank, config.lora.alpha, config.data.max_length) == (128, 256, 2048)
    if path.stem.removesuffix("_align") in DECODERS and path.stem.endswith("_align"):
        assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 256
        assert (arguments.learning_rate, config.data.max_length) == (1e-3, 2048)


@pytest.mark.parametrize("name", DECODERS)
def test_instruct_goes_on_where_align_ends(name):
    """Encoder and data are given; all else that a projector belongs to is the same in both configurations."""
    align, instruct = (
        load_run_config(InstructConfig, next(path for path in CONFIGS if path.stem == stem), FILLED_IN[::2])
        for stem in (f"{name}_align", name)
    )
    assert align.lora is None and align.projector is None
    assert instruct.projector == align.output_dir
    assert (instruct.decoder, instruct.chat_template, instruct.dtype) == (
        align.decoder,
        align.chat_template,
        align.dtype,
    )


@pytest.mark.parametrize("name", DECODERS)
def test_full_size_model_builds(name):
    """On the meta device, around the published large encoder."""
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_run_config(InstructConfig, path, FILLED_IN)
    tokenizer = make_tokenizer()
    with torch.device("meta"):
        encoder = SparseFormerModel(SparseFormerConfig.from_name("sparseformer_btsp_openai_clip_large"))
        decoder = AutoModelForCausalLM.from_config(DECODERS[name], dtype=getattr(torch, config.dtype))
        model, processor = join(encoder, make_image_processor(), decoder, tokenizer, config.chat_template)
        adapted = add_adapters(model, rank=config.lora.rank, alpha=config.lora.alpha, dropout=config.lora.dropout)
    assert all(parameter.is_meta for parameter in adapted.parameters())
    assert processor.image_seq_length == 64
    assert model.lm_head.weight.shape[0] == DECODERS[name].vocab_size  # there was room for <image>
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    width = DECODERS[name].hidden_size
    projector = sum(count for key, count in trained.items() if PROJECTOR in key)
    assert projector == (1024 + 1) * width + (width + 1) * width
    assert sum(trained.values()) - projector == ADAPTERS[name]


@pytest.mark.parametrize("name", DECODERS)
def test_full_size_configs_ask_for_encoder_and_data(name):
    path = next(path for path in CONFIGS if path.stem == name)
    with pytest.raises(InputError, match=r"data\.conversations, encoder"):
        load_run_config(InstructConfig, path)
