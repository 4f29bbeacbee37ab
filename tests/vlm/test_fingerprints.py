import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import CLIPVisionConfig, LlavaConfig, TorchAoConfig

from sf_mllm.errors import InputError
from sf_mllm.vlm.build import cast_weights
from sf_mllm.vlm.fingerprints import (
    Fingerprints,
    fingerprint,
    fingerprint_decoder,
    fingerprint_vocabulary,
    read_fingerprints,
    write_fingerprints,
)
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_encoder, make_sf_llava


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_does_not_matter_and_a_training_step_does(dtype):
    expected = fingerprint(make_encoder())
    assert fingerprint(make_encoder().to(dtype)) == expected
    assert fingerprint(make_encoder().to(dtype).float()) == expected
    trained = make_encoder()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():  # what AdamW does in a first step at a rate of 1e-4
            parameter += 1e-4 * torch.randn(parameter.shape, generator=generator).sign()
    assert fingerprint(trained) != expected


def test_names_and_shapes_count():
    assert fingerprint(torch.nn.Linear(4, 4, bias=False)) != fingerprint(torch.nn.Linear(2, 8, bias=False))
    first, second = torch.nn.ModuleDict(), torch.nn.ModuleDict()
    first["a"] = second["b"] = torch.nn.Linear(3, 3)
    assert fingerprint(first) != fingerprint(second)


def test_large_tensors_are_sampled_over_all_their_columns():
    layer = torch.nn.Linear(1024, 1024, bias=False)  # 16 times as many values as are looked at
    before = fingerprint(layer)
    seen = 0
    for column in range(1, 1024, 64):  # an even distance between values would pass all of these by
        with torch.no_grad():
            layer.weight[:, column] *= -1
        seen += fingerprint(layer) != before
        before = fingerprint(layer)
    assert seen == 16


def test_values_that_cannot_be_read_have_no_fingerprint():
    with torch.device("meta"):
        assert fingerprint(torch.nn.Linear(2, 2)) is None
    quantised = torch.nn.Linear(2, 2)
    quantised.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(quantised) is None
    wrapped = torch.nn.Linear(2, 2)
    wrapped.weight = torch.nn.Parameter(
        TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2))
    )  # as torchao's look from outside
    assert fingerprint(wrapped) is None
    unknown, known = Fingerprints(), Fingerprints(encoder="a", decoder="b")
    unknown.refuse_other(known, owner="", otherwise="")
    known.refuse_other(unknown, owner="", otherwise="")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_keeps_its_fingerprint_when_its_vocabulary_grows(family, tied):
    decoder = make_decoder(family, vocab_size=100, tied=tied)
    expected = fingerprint_decoder(decoder)
    decoder.resize_token_embeddings(164)
    assert fingerprint_decoder(decoder) == expected
    with torch.no_grad():
        decoder.base_model.layers[1].mlp.down_proj.weight[0].neg_()
    assert fingerprint_decoder(decoder) != expected


def test_a_joined_model_has_the_fingerprints_of_its_parts():
    model, processor = make_sf_llava()
    recorded = Fingerprints.from_record(model.config.fingerprints)
    assert recorded.tokens_per_image == processor.image_seq_length
    assert recorded.encoder == fingerprint(make_encoder())
    assert recorded.decoder == fingerprint_decoder(make_decoder(vocab_size=len(make_tokenizer())))
    assert recorded.vocabulary == fingerprint_vocabulary(processor.tokenizer)
    other = make_tokenizer()
    other.add_tokens(["<more>"])
    assert recorded.vocabulary != fingerprint_vocabulary(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_loads_in_any_precision(tmp_path, dtype):
    model, _ = make_sf_llava(tied=True)
    before = dict(model.config.fingerprints)
    cast_weights(model, torch.float16).save_pretrained(tmp_path)
    loaded = SFLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.config.fingerprints == before


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("encoder", "model.vision_tower.cortex.0.mlp.fc1.weight"),
        ("decoder", "model.language_model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_weights_that_were_exchanged_under_a_configuration_are_refused(saved_copy, part, name):
    weights = load_file(saved_copy / "model.safetensors")
    name = name if name in weights else next(key for key in weights if "vision_tower" in key and weights[key].dim() > 1)
    weights[name] = -weights[name]
    save_file(weights, saved_copy / "model.safetensors", {"format": "pt"})
    expected = f"The configuration in '.*' belongs to another {part} .*; .*copy config.json and the weights again"
    with pytest.raises(InputError, match=expected):
        SFLlavaForConditionalGeneration.from_pretrained(saved_copy)


@pytest.fixture
def saved_copy(tmp_path):
    make_sf_llava()[0].save_pretrained(tmp_path)
    return tmp_path


def test_a_model_that_was_trained_further_saves_its_new_fingerprints(saved_copy):
    model = SFLlavaForConditionalGeneration.from_pretrained(saved_copy)
    before = dict(model.config.fingerprints)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.neg_()
    model.save_pretrained(saved_copy)
    again = SFLlavaForConditionalGeneration.from_pretrained(saved_copy)
    assert again.config.fingerprints["decoder"] != before["decoder"]
    assert again.config.fingerprints | {"decoder": None} == before | {"decoder": None}


def test_a_model_without_a_record_is_not_checked(saved_copy):
    config = json.loads((saved_copy / "config.json").read_text())
    del config["fingerprints"]
    (saved_copy / "config.json").write_text(json.dumps(config))
    model = SFLlavaForConditionalGeneration.from_pretrained(saved_copy)
    model.save_pretrained(saved_copy)
    assert model.config.fingerprints is None


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_weights_that_torchao_quantises_while_they_are_loaded_are_not_compared(saved_copy, tmp_path, part):
    quantization = pytest.importorskip("torchao.quantization")
    others = {"vision_tower", "language_model"} - {part}
    skipped = [*(f"model.{other}" for other in others), "model.multi_modal_projector", "lm_head"]
    skipped.append(r"model.vision_tower.(stem|initial|focusing|projection)")
    eight_bits = quantization.Int8WeightOnlyConfig(set_inductor_config=False, version=2)
    config = TorchAoConfig(eight_bits, modules_to_not_convert=skipped)
    model = SFLlavaForConditionalGeneration.from_pretrained(saved_copy, quantization_config=config)
    recorded = Fingerprints.from_record(model.config.fingerprints)
    assert None not in recorded.to_record().values()
    model.save_pretrained(tmp_path / "quantised")
    again = SFLlavaForConditionalGeneration.from_pretrained(tmp_path / "quantised")
    quantised = {name for name, weight in again.named_parameters() if is_traceable_wrapper_subclass(weight)}
    assert quantised and all(name.startswith(f"model.{part}.") for name in quantised)
    assert all(is_traceable_wrapper_subclass(model.get_parameter(name)) for name in quantised)
    assert len([value for value in again.config.fingerprints.values() if value is None]) == 1  # the quantised part


def test_a_stock_llava_of_576_tokens_is_refused_in_one_sentence(tmp_path):
    LlavaConfig(vision_config=CLIPVisionConfig(image_size=336, patch_size=14), image_seq_length=576).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="clip_vision_model") as caught:
        SFLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert "576" in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_of_fingerprints(tmp_path):
    written = Fingerprints(6, "a", "b", "c", "d")
    write_fingerprints(tmp_path, written)
    assert read_fingerprints(tmp_path) == written
    (tmp_path / "fingerprints.json").write_text(json.dumps(written.to_record() | {"of a later version": 1}))
    assert read_fingerprints(tmp_path) == written
    for content in ("", "[]", "{"):
        (tmp_path / "fingerprints.json").write_text(content)
        with pytest.raises(InputError, match=r"fingerprints\.json' is damaged; copy"):
            read_fingerprints(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match=r"has no fingerprints\.json"):
        read_fingerprints(tmp_path)
