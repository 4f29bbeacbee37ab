import itertools
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo import shared, train_decoder
from scripts.demo.decoder_data import TYPES, EncodedBatches, SceneConversations, load_batches
from scripts.demo.decoder_tokenizer import VOCABULARY_SIZE, train_tokenizer
from scripts.demo.shared import Budget
from scripts.demo.train_decoder import DecoderTraining, build_decoder, main
from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.data.chat import encode_conversation, stop_token
from sf_mllm.data.scenes.domains import COLORS, DOMAINS, SHAPES, SIZE_ORDER, TEXTURES, plural_noun
from sf_mllm.data.scenes.language import AREA_PHRASES, PLACE_PHRASES, RELATION_PHRASES
from sf_mllm.data.scenes.phrasings import PHRASINGS
from sf_mllm.data.scenes.questions import QUESTION_TYPES


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0)


def encoded(tokenizer, domain="plain", batch_size=6, max_length=256):
    return EncodedBatches(SceneConversations(3, domain), tokenizer, batch_size=batch_size, max_length=max_length)


def test_the_tokenizer_writes_any_text_and_every_word_of_the_questions_is_one_token(tokenizer):
    assert len(tokenizer) == VOCABULARY_SIZE
    text = "Wörter, 12 日本 and\nlines"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).removeprefix(" ") == text
    templates = [template for them in PHRASINGS.values() for template in them]
    phrases = [*PLACE_PHRASES.values(), *itertools.chain(*AREA_PHRASES.values(), *RELATION_PHRASES.values())]
    names = [*COLORS, *SIZE_ORDER, *TEXTURES, *SHAPES, *map(plural_noun, SHAPES), "colour", "Objects", "objects"]
    texts = [re.sub(r"\{\w\}|'s|[?.:,-]", " ", text) for text in (*templates, *phrases, *names)]
    words = {word for text in texts for word in text.split()}
    assert len(words) > 150
    assert [word for word in words if len(tokenizer(word)["input_ids"]) > 1] == []
    assert stop_token(tokenizer) == tokenizer.eos_token == "<|end|>"
    assert tokenizer("<image>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<image>")]


@pytest.mark.parametrize("domain", DOMAINS)
def test_batches_are_the_conversations_as_any_reader_would_encode_them(tokenizer, domain):
    batch = encoded(tokenizer, domain)[2]
    assert batch["input_ids"].shape == batch["labels"].shape == (6, 256)
    conversations = list(SceneConversations(3, domain).read(torch.arange(12, 18)))
    for row, messages in enumerate(conversations):
        kept = int((batch["input_ids"][row] == tokenizer.convert_tokens_to_ids("<|assistant|>")).sum())
        expected = encode_conversation(tokenizer, messages[: 2 * kept], image_seq_length=1)
        assert (
            kept == len(messages) // 2
            or len(encode_conversation(tokenizer, messages[: 2 * kept + 2], image_seq_length=1).input_ids) > 256
        )
        length = len(expected.input_ids)
        assert batch["input_ids"][row].tolist() == expected.input_ids + [tokenizer.pad_token_id] * (256 - length)
        assert batch["labels"][row].tolist() == expected.labels + [IGNORE_INDEX] * (256 - length)
        assert messages[0].text.startswith("Objects: ") and kept > 3


def test_a_batch_depends_on_its_number_only(tokenizer):
    few, many = encoded(tokenizer, batch_size=2), encoded(tokenizer, batch_size=4)
    assert torch.equal(torch.cat([few[2]["input_ids"], few[3]["input_ids"]]), many[1]["input_ids"])
    assert len(many) == 2**30
    loaded = list(itertools.islice(load_batches(few, 1, pin_memory=False), 5))
    for number, batch in enumerate(loaded):
        assert torch.equal(batch["input_ids"], few[number]["input_ids"])
        assert torch.equal(batch["labels"], few[number]["labels"])


def test_hard_types_come_more_often():
    assert set(TYPES) == set(QUESTION_TYPES)
    assert TYPES.count("comparison") == 3 and TYPES.count("relation") == 2


def test_loss_is_that_of_transformers_and_a_step_without_a_rate_changes_nothing(tokenizer):
    torch.manual_seed(0)
    model = build_decoder(tokenizer, hidden_size=32, layers=2, heads=2)
    batch = encoded(tokenizer, batch_size=3)[0]
    expected = model(input_ids=batch["input_ids"].long(), labels=batch["labels"].long()).loss
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = DecoderTraining(model, 1e-2, compiles=False)
    torch.testing.assert_close(training.learn(batch, factor=0), expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    training.learn(batch, factor=1)
    assert training.learn(batch, factor=0) < expected


def test_the_rate_warms_up_and_ends_at_zero():
    budget = Budget(steps=1000, seconds=None)
    rates = [budget.learning_rate_factor(step) for step in range(1001)]
    assert rates[0] < 0.01
    assert max(rates) == rates[30] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[30:]))
    assert rates[-1] == pytest.approx(0)


def test_an_evaluation_does_not_use_up_the_time(monkeypatch):
    now = iter([100.0, 100.0, 104.0, 110.0])
    monkeypatch.setattr(shared.time, "monotonic", lambda: next(now))
    budget = Budget(steps=None, seconds=10)
    assert budget.spent(0) == 0
    assert budget.spent(1) == pytest.approx(0.4)
    budget.leave_out(5)
    assert budget.spent(2) == pytest.approx(0.5)


@pytest.mark.parametrize("length", [["--steps", "12"], ["--seconds", "2", "--evaluate-every-s", "1"]])
def test_a_tiny_run_learns_saves_and_measures(tokenizer, tmp_path, length, capsys, monkeypatch):
    # Training the tokenizer takes longer than all the rest, and it is the fixture's.
    monkeypatch.setattr(train_decoder, "train_tokenizer", lambda seed: {0: tokenizer}[seed])
    size = ["--hidden-size", "32", "--layers", "1", "--heads", "2", "--max-length", "160", "--batch-size", "8"]
    data = ["--questions", "9", "--samples", "3", "--workers", "0", "--device", "cpu", "--logging-steps", "1"]
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
    assert any(row.get("samples") == 3 and row["type"] == "mean" for row in rows) == ("--seconds" in length)
    (waited,) = (row for row in rows if "waited_for_data_s" in row)
    assert 0 < waited["waited_for_data_s"] < waited["seconds"]
    assert "majority" in capsys.readouterr().out
    assert main(["--out", str(out), "--steps", "1"]) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "nothing to train"),
        (["--steps", "1", "--heads", "5"], "multiple of twice"),
        (["--steps", "1", "--max-length", "64"], "at least 128"),
        (["--steps", "1", "--samples", "0"], "at least 1"),
        (["--steps", "1", "--domain", "photos"], "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys, given, said):
    assert main(["--out", str(tmp_path / "decoder"), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
