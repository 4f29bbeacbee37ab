import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo.decoder_data import VOCABULARY_SIZE, encode_scenes, scene_conversations, train_tokenizer
from scripts.demo.shared import Budget
from scripts.demo.train_decoder import main
from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.data.chat import stop_token


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0, conversations=300)


def test_the_tokenizer_writes_any_text_and_is_short_on_scenes(tokenizer):
    assert len(tokenizer) == VOCABULARY_SIZE
    text = "Wörter, 12 日本 and\nlines"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).removeprefix(" ") == text
    (conversation,) = scene_conversations([7], seed=3)
    texts = [message.text for message in conversation]
    assert sum(len(tokenizer(text)["input_ids"]) for text in texts) < 1.5 * sum(len(text.split()) for text in texts)
    assert stop_token(tokenizer) == tokenizer.eos_token == "<|end|>"
    assert tokenizer("<image>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<image>")]


def test_encoded_scenes_are_the_conversations(tokenizer):
    dataset = encode_scenes(tokenizer, 5, seed=3, max_length=400, workers=1)
    batch = dataset.__getitems__([4, 1])
    for row, index in enumerate((4, 1)):
        (conversation,) = scene_conversations([index], seed=3)
        learnt = batch["labels"][row]
        answers = tokenizer.decode(learnt[learnt != IGNORE_INDEX].tolist())
        assert answers == "".join(f" {m.text}<|end|>" for m in conversation if m.role == "assistant")
        ids = batch["input_ids"][row]
        text = tokenizer.decode(ids[ids != tokenizer.pad_token_id].tolist())
        assert text == "".join(f"<|{message.role}|> {message.text}<|end|>" for message in conversation)
        assert text.startswith("<|user|> The image shows ")


def test_rows_do_not_depend_on_the_number_of_rows_or_processes(tokenizer):
    few = encode_scenes(tokenizer, 3, seed=3, max_length=64, workers=1)
    more = encode_scenes(tokenizer, 6, seed=3, max_length=64, workers=1)
    assert torch.equal(few.input_ids, more.input_ids[:3])
    assert torch.equal(few.labels, more.labels[:3])


def test_the_rate_warms_up_and_ends_at_zero():
    budget = Budget(steps=1000, seconds=None)
    rates = [budget.learning_rate_factor(step) for step in range(1001)]
    assert rates[0] < 0.01
    assert max(rates) == rates[30] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[30:]))
    assert rates[-1] == pytest.approx(0)


@pytest.mark.parametrize("length", [["--steps", "12"], ["--seconds", "1"]])
def test_a_tiny_run_learns_saves_and_measures(tmp_path, length):
    size = ["--hidden-size", "32", "--layers", "1", "--heads", "2", "--max-length", "96", "--batch-size", "8"]
    data = ["--scenes", "40", "--questions", "9", "--workers", "1", "--device", "cpu", "--logging-steps", "1"]
    out = tmp_path / "decoder"
    assert main(["--out", str(out), *length, *size, *data, "--learning-rate", "1e-2"]) == 0
    decoder, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert decoder.dtype == torch.float16
    assert decoder.config.use_cache
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert len(tokenizer) == decoder.config.vocab_size == VOCABULARY_SIZE
    rows = [json.loads(line) for line in (tmp_path / "decoder.metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert rows[-1]["type"] == "mean"
    assert rows[-1]["samples"] == 9
    assert main(["--out", str(out), "--steps", "1"]) == 2
