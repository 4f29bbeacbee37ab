"""QLoRA; what needs bitsandbytes is skipped where it is not installed (it works on CPUs, too)."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from sf_mllm.errors import InputError
from sf_mllm.training.instruct import run as instruct_run
from sf_mllm.training.instruct.quantization import make_quantization_config, refuse_split_quantized_weights
from tests.tiny_text import make_tokenizer
from tests.training.tiny_instruct import ALIGN, KilledError, make_config, steps_of

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
FOUR_BIT = {"quantization": "4bit"}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Its layers' sizes are multiples of 64, which bitsandbytes wants on CPUs that it has fast code for."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_settings_are_those_of_qlora(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    settings = make_quantization_config().to_dict()
    assert settings["load_in_4bit"] and settings["bnb_4bit_use_double_quant"]
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_compute_dtype"]) == ("nf4", "bfloat16")


def test_without_the_library_one_sentence_says_what_to_do(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package bitsandbytes, .*; pip install bitsandbytes, or set"):
        instruct_run.run_instruct(make_config(parts, tmp_path / "run", **FOUR_BIT))


def test_an_unknown_quantization_is_refused(parts, tmp_path):
    with pytest.raises(InputError, match=r"quantization '8bit' is unknown\. Did you mean '4bit'\? Allowed: null, 4bit"):
        make_config(parts, tmp_path / "run", quantization="8bit")


def test_weights_that_are_split_are_refused(monkeypatch):
    for strategy in ("ZeRO-3", "FSDP"):
        monkeypatch.setattr("sf_mllm.training.instruct.quantization.describe_strategy", lambda _, name=strategy: name)
        with pytest.raises(InputError, match=f"4bit does not go with {strategy}"):
            refuse_split_quantized_weights(None)
    monkeypatch.setattr("sf_mllm.training.instruct.quantization.describe_strategy", lambda _: "ZeRO-2")
    refuse_split_quantized_weights(None)


@needs_bitsandbytes
def test_only_the_layers_of_the_decoder_are_quantised(parts, decoder, tmp_path):
    import bitsandbytes
    from peft.tuners.lora.bnb import Linear4bit

    changes = {"decoder": decoder, "dtype": "bfloat16"}
    whole, _ = instruct_run.build_model(make_config(parts, tmp_path / "run", **changes))
    model, _ = instruct_run.build_model(make_config(parts, tmp_path / "run", **changes | FOUR_BIT))
    base = model.get_base_model()
    quantised = [name for name, part in model.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) >= 2 * 7 and all(".language_model." in name for name in quantised)
    adapted = [part for part in model.modules() if isinstance(part, Linear4bit)]
    assert len(adapted) == 2 * 7  # PEFT's own class for such layers
    kept = [base.lm_head.weight, *(p for name, p in base.named_parameters() if "vision_tower" in name)]
    assert {p.dtype for p in kept} == {torch.bfloat16, torch.float32}  # coordinates are float32
    # It is known as the decoder that it was made from, and the same weights train.
    assert base.config.fingerprints == whole.get_base_model().config.fingerprints
    assert "quantization_config" not in base.config.text_config.to_dict()
    expected = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    actual = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    assert {p.dtype for p in actual.values()} == {torch.float32}
    assert model.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters()
    assert all(torch.equal(p, expected[name]) for name, p in actual.items() if "projector" in name)


@needs_bitsandbytes
@pytest.mark.parametrize("changes", [{}, ALIGN], ids=["instruct", "align"])
def test_a_quantised_run_resumes_and_is_merged_into_the_decoder_on_disk(
    parts, decoder, tmp_path, kill_after_step, changes
):
    changes = changes | FOUR_BIT | {"decoder": decoder}
    train = {"gradient_checkpointing": True, "save_steps": 2}
    undisturbed = instruct_run.run_instruct(make_config(parts, tmp_path / "whole", train=train, **changes))
    kill_after_step(3)
    with pytest.raises(KilledError):
        instruct_run.run_instruct(make_config(parts, tmp_path / "killed", train=train, **changes))
    kill_after_step(None)
    resumed = instruct_run.run_instruct(make_config(parts, tmp_path / "killed", train=train, **changes))
    expected, actual = load_file(undisturbed / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")

    adapter = tmp_path / "whole" / "adapter" / "adapter_model.safetensors"
    updates = load_file(adapter) if adapter.exists() else {}
    assert len(updates) == (0 if "lora" in changes else 2 * 14 + 4)
    for name, weight in load_file(decoder / "model.safetensors").items():
        name = name.replace("model.", "model.language_model.", 1)
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in updates:
            weight += 8 / 4 * updates[f"{layer}.lora_B.weight"] @ updates[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(expected[name], weight)
    assert "quantization_config" not in json.loads((undisturbed / "config.json").read_text())["text_config"]
