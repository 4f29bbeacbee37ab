import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sf_mllm.errors import InputError
from sf_mllm.inference.loading import choose_device, choose_dtype, load_model
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_encoder, make_image_processor, make_sf_llava


@pytest.fixture
def directory(saved_model, tmp_path):
    return shutil.copytree(saved_model, tmp_path / "model")


def refusal(path, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_loads_the_saved_weights_exactly(directory):
    model, processor = load_model(directory, device="cpu")
    assert isinstance(model, SFLlavaForConditionalGeneration) and isinstance(processor, SFLlavaProcessor)
    assert not model.training and model.dtype == torch.float32
    saved = make_sf_llava()[0].state_dict()
    assert saved.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0, msg=name)


def test_other_types(directory):
    assert load_model(directory, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_run_folder_stands_for_the_model_in_it(directory):
    assert isinstance(load_model(directory.parent, device="cpu")[0], SFLlavaForConditionalGeneration)


def test_shards(directory):
    model, _ = make_sf_llava()
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="100KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(directory, device="cpu")

    shards[1].unlink()
    message = refusal(directory)
    assert f"lacks 1 of {len(shards)} weight files: {shards[1].name}" in message

    (directory / "model.safetensors.index.json").write_text("{}")
    assert "does not list the weight files" in refusal(directory)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights (model.safetensors"),
        ("tokenizer.json", "has no tokenizer"),
        ("processor_config.json", "has no image settings"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_missing_file(directory, file, expected):
    (directory / file).unlink()
    assert expected in refusal(directory)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"not what it should be"])
def test_damaged_file(directory, file, content):
    (directory / file).write_bytes(content)
    assert str(directory) in refusal(directory)


def test_truncated_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in refusal(directory)


def test_weights_of_a_wrong_shape(directory):
    tensors = load_file(directory / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    assert name in tensors
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, directory / "model.safetensors", {"format": "pt"})
    message = refusal(directory)
    assert message.startswith("The weights in ") and f"{name} is [48, 31] instead of [48, 32]" in message


def test_missing_and_unknown_weights(directory):
    tensors = load_file(directory / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.bias"
    bias = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    message = refusal(directory)
    assert name in message and "missing" in message

    save_file(tensors | {name: bias, "model.extra.weight": bias.clone()}, directory / "model.safetensors")
    assert "model.extra.weight" in refusal(directory)


def test_a_tokenizer_or_template_of_another_model(directory):
    template = directory / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + "{# changed #}")
    assert "belongs to another chat template (fingerprint " in refusal(directory)
    template.write_text(before)
    load_model(directory, device="cpu")

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(directory)
    assert "belongs to another tokenizer (fingerprint " in refusal(directory)


def test_another_number_of_visual_tokens(directory):
    settings = json.loads((directory / "processor_config.json").read_text())
    (directory / "processor_config.json").write_text(json.dumps(settings | {"image_seq_length": 576}))
    assert "belongs to an encoder of 6 tokens an image, and the one here gives 576" in refusal(directory)


def test_strictness_holds_for_models_of_others_too(tmp_path):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
        ),
        text_config=LlamaConfig(
            vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=3,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor = LlavaProcessor(make_image_processor(), make_tokenizer(), 16, "default", num_additional_image_tokens=1)
    processor.save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path, device="cpu")[0], LlavaForConditionalGeneration)

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    found = next(key for key in tensors if key.endswith("multi_modal_projector.linear_1.weight"))
    save_file(tensors | {found: tensors[found][:, :-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert f"{name} is [8, 7] instead of [8, 8]" in refusal(tmp_path)


def test_unknown_model_type(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "sf_lava"}))
    assert "sf_lava" in refusal(directory)


def test_encoder_given_by_mistake(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    make_image_processor().save_pretrained(tmp_path)
    assert "is a vision encoder and cannot answer" in refusal(tmp_path)


def test_language_model_given_by_mistake(tmp_path):
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "'llama' model, which does not read images" in refusal(tmp_path)


def test_adapter_given_by_mistake(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter without its model" in refusal(tmp_path)


def test_run_folder_without_a_model(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert "run folder without a finished model" in refusal(tmp_path)


def test_paths_that_are_no_model(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "does not exist" in refusal("./nothing")
    assert "does not exist" in refusal("nothing")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")
    assert "Did you mean 'sf_llava'?" in refusal("demo:sf_lava")


def test_hub_id_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither a directory here nor can it be fetched" in refusal("nobody-at-all/no-such-model")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", None),
        ("cuda:99", "cuda:99"),
        ("gpu", "unknown"),
        ("cud", "unknown"),
        ("meta", "not available"),
        ("cpu:1", "does not exist"),
        ("", "unknown"),
    ],
)
def test_device_names(name, expected):
    if expected is None:
        assert choose_device(name) == torch.device(name)
    else:
        with pytest.raises(InputError, match=expected):
            choose_device(name)


def test_device_is_chosen_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert choose_device(None).type == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device(None).type == "mps"
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert choose_device(None).type == "cpu"


def test_dtype_follows_the_device():
    assert choose_dtype(None, torch.device("cpu")) == torch.float32
    assert choose_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(InputError, match="Did you mean 'bfloat16'"):
        choose_dtype("bf16", torch.device("cpu"))
