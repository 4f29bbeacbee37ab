import pytest
import torch
from transformers import BertConfig, BertModel

from sf_mllm.data.chat import stop_token
from sf_mllm.errors import InputError
from sf_mllm.vlm.adapters import add_adapters
from sf_mllm.vlm.build import build_sf_llava, cast_weights
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_encoder, make_image_processor, make_sf_llava


def build(decoder, tokenizer):
    return build_sf_llava(
        make_encoder(),
        make_image_processor(),
        decoder,
        tokenizer,
        chat_template=tokenizer.chat_template,
        stop_token=stop_token(tokenizer),
    )


def tokenizer_without_image_token():
    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer.to_str().replace("<image>", "<other>")
    tokenizer.backend_tokenizer.from_str(core)
    renamed = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(core),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=tokenizer.chat_template,
    )
    assert "<image>" not in renamed.get_vocab()
    return renamed


@pytest.mark.parametrize("tied", [False, True])
def test_an_unused_row_of_a_padded_vocabulary_is_taken(tied):
    tokenizer = tokenizer_without_image_token()
    rows = len(tokenizer) + 10
    decoder = make_decoder(vocab_size=rows, tied=tied)
    before = decoder.get_input_embeddings().weight.clone()
    model, _ = build(decoder, tokenizer)
    assert model.config.image_token_id == len(tokenizer) - 1 == rows - 10
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.config.text_config.vocab_size == rows
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_vocabulary_grows_to_a_multiple_of_64_by_mean_rows(tied):
    tokenizer = tokenizer_without_image_token()
    rows = len(tokenizer)
    decoder = make_decoder(vocab_size=rows, tied=tied)
    embedding, head = decoder.get_input_embeddings().weight.clone(), decoder.get_output_embeddings().weight.clone()
    model, processor = build(decoder, tokenizer)
    assert model.config.image_token_id == processor.image_token_id == rows
    grown = -(-(rows + 1) // 64) * 64
    assert model.config.text_config.vocab_size == grown
    for new, old in ((model.get_input_embeddings().weight, embedding), (model.lm_head.weight, head)):
        assert new.shape[0] == grown
        assert torch.equal(new[:rows], old)
        torch.testing.assert_close(new[rows:], old.mean(dim=0).expand(grown - rows, -1))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied


def test_generation_stops_at_the_template_and_at_the_end_of_text():
    model, processor = make_sf_llava(template="llama3")
    ids = processor.tokenizer.convert_tokens_to_ids
    assert model.generation_config.eos_token_id == sorted(ids(["<|eot_id|>", "</s>"]))
    assert model.generation_config.suppress_tokens == [ids("<image>")]


def test_a_tokenizer_without_padding_gets_one():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    build(make_decoder(vocab_size=len(tokenizer)), tokenizer)
    assert tokenizer.pad_token == "</s>"


def test_a_model_without_language_head_is_refused():
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(InputError, match="The decoder is a BertModel, not a causal language model"):
        build(bert, make_tokenizer())


def test_cast_weights_spares_coordinates_and_ties():
    model, _ = make_sf_llava(tied=True)
    rois = model.model.vision_tower.initial.rois.clone()
    cast_weights(model, torch.float16)
    assert torch.equal(model.model.vision_tower.initial.rois, rois)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert [name for name, kind in kinds.items() if kind != torch.float16] == (
        [name for name in kinds if name.endswith("initial.rois")]
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_adapters_sit_on_the_language_model_only_and_train_in_float32(family):
    model, _ = make_sf_llava(family)
    adapted = add_adapters(model.bfloat16(), rank=4, alpha=8, dropout=0.0)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    lora = [name for name in trained if "lora_" in name]
    assert len(lora) == 2 * 7 * 2  # layers x linear layers x (A, B)
    assert all(".language_model." in name for name in lora)
    assert len(trained) - len(lora) == 4  # weights and biases of the projector


def test_a_language_model_with_unknown_layers_is_refused():
    model, _ = make_sf_llava()
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in list(part._modules):
                part._modules[f"other_{name}"] = part._modules.pop(name)
    with pytest.raises(InputError, match="The decoder, a LlamaModel, has no layers"):
        add_adapters(model, rank=4, alpha=8, dropout=0.0)
