import json
import logging

import numpy as np
import pytest

from sf_mllm.constants import IGNORE_INDEX, IMAGE_TOKEN
from sf_mllm.data import row_checks
from sf_mllm.data.conversation_sources import ChosenConversations, JoinedConversations
from sf_mllm.data.conversation_specs import open_conversations
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.data.row_checks import Problem, RowChecks, check_rows
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import NUM_TOKENS, make_image, make_image_processor


def talk(*texts, **others):
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]} | others


ROWS = [
    talk("<image>\nWhat?", "a red circle", image="0.png"),
    talk("<image> and <image>", "yes", "then <image>?", "no", image=["0.png", "1.png", "0.png"]),
    talk("Hello", "Hi"),
    talk("Hello"),
    talk("<image>", "x", image="gone\n.png"),
    talk("<image>", "x", image="cut.png"),
    talk("<image>", "x", image=["cut.png", "gone.png"]),
    talk("Hello", "Hi"),
    talk("<image> and <image>", "x", image=["cut.png", "gone.png"]),
    talk("What colour is the square? " * 30, "green", "How many?", "3"),
    talk("How many?", "3", "What colour is the square? " * 4 + "<image>", "green", image="1.png"),
    talk("How many?", "green " * 100),
]


@pytest.fixture
def source(tmp_path):
    for index in range(2):
        make_image(index).save(tmp_path / f"{index}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return JoinedConversations([open_conversations(str(tmp_path / "rows.json"))], "rows")


def check(source, *, max_length=110, decode_images=True, template="qwen2.5"):
    tokenizer = make_tokenizer(template)
    return check_rows(
        source, tokenizer, image_seq_length=NUM_TOKENS, max_length=max_length, decode_images=decode_images
    )


def test_each_row_is_said_to_be_what_it_is(source):
    checks = check(source)
    assert [Problem(problem) for problem in checks.rows["problem"]] == [
        *[Problem.NONE] * 3,
        Problem.MALFORMED,
        Problem.MISSING_IMAGE,
        Problem.DAMAGED_IMAGE,
        Problem.MALFORMED,
        Problem.NONE,
        Problem.MISSING_IMAGE,
        Problem.NO_ANSWER,
        Problem.CUT_IMAGE,
        Problem.NONE,
    ]
    assert checks.usable.tolist() == [problem == 0 for problem in checks.rows["problem"]]
    assert checks.reasons.keys() == set(np.flatnonzero(~checks.usable))
    assert checks.reasons[4].endswith("gone .png' does not exist")  # one line
    assert "cut.png' is damaged or incomplete" in checks.reasons[5]
    assert checks.reasons[9].endswith("max_length=110 keeps none of an answer")
    assert "of its 6 visual" in checks.reasons[10]
    assert checks.count_problems() == {
        "malformed": 2,
        "missing image": 2,
        "damaged image": 1,
        "no answer within max_length": 1,
        "image cut off by max_length": 1,
    }
    assert checks.rows["turns"].tolist() == [2, 4, 2, 0, 2, 2, 0, 2, 2, 4, 4, 2]
    assert checks.rows["images"].tolist() == [1, 3, 0, 0, 1, 1, 0, 0, 2, 0, 1, 0]
    assert checks.rows["missing_images"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert checks.rows["damaged_images"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]


def test_tokens_are_those_that_training_gets(source):
    checks = check(source)
    image_id = make_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)

    def rows(max_length):
        chosen = ChosenConversations(source, np.flatnonzero(checks.usable))
        return ConversationDataset(
            chosen, make_tokenizer(), make_image_processor(), image_seq_length=NUM_TOKENS, max_length=max_length
        )

    for found, kept, whole in zip(checks.rows[checks.usable], rows(110), rows(10_000), strict=True):
        assert found["kept_tokens"] == len(kept["input_ids"]) and found["tokens"] == len(whole["input_ids"])
        assert found["kept_answer_tokens"] == sum(label != IGNORE_INDEX for label in kept["labels"])
        assert found["answer_tokens"] == sum(label != IGNORE_INDEX for label in whole["labels"])
        assert kept["input_ids"].count(image_id) == found["images"] * NUM_TOKENS
    long = checks.rows[11]
    assert long["kept_tokens"] == 110 and 0 < long["kept_answer_tokens"] < long["answer_tokens"]


def test_processes_find_the_same(source, monkeypatch, caplog):
    alone = check(source)
    monkeypatch.setattr(row_checks, "_count_processes", lambda *_: 2)
    monkeypatch.setattr(row_checks, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(row_checks, "_SECONDS_BETWEEN_LINES", 0)
    caplog.set_level(logging.INFO)
    together = check(source)
    assert np.array_equal(alone.rows, together.rows) and alone.reasons == together.reasons
    assert "5 of 12 conversations checked, about 0 s left" in caplog.text


def test_images_are_decoded_only_on_request(source):
    checks = check(source, decode_images=False)
    assert checks.rows["problem"][5] == Problem.NONE
    assert checks.rows["problem"][4] == Problem.MISSING_IMAGE
    assert not checks.rows["damaged_images"].any()


def test_a_repaired_image_is_seen_by_the_next_check(source, tmp_path):
    assert check(source).rows["problem"][5] == Problem.DAMAGED_IMAGE
    make_image(0).save(tmp_path / "cut.png")
    assert check(source).rows["problem"][5] == Problem.NONE


def test_equal_rows_have_equal_digests(source):
    digests = check(source).rows["digest"]
    assert digests[2] == digests[7]
    different = np.delete(digests, [3, 6, 7])  # malformed rows have none
    assert len(set(different)) == len(different)


def test_a_template_that_refuses_a_row_is_no_reason_to_stop(tmp_path):
    system = {"from": "system", "value": "Be brief."}
    rows = [{"conversations": [system, *talk("Hello", "Hi")["conversations"]]}, talk("Hello", "Hi")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    checks = check(JoinedConversations([open_conversations(str(tmp_path / "rows.json"))], "rows"), template="gemma")
    assert checks.count_problems() == {"refused by the chat template": 1}
    assert "System role not supported" in checks.reasons[0]


def test_checks_are_read_back_for_the_same_data_only(source, tmp_path):
    checks = check(source)
    path = tmp_path / "checks.npz"
    assert RowChecks.load(path, "key") is None
    checks.save(path, "key")
    again = RowChecks.load(path, "key")
    assert np.array_equal(again.rows, checks.rows) and again.reasons == checks.reasons
    assert RowChecks.load(path, "another key") is None
    path.write_bytes(path.read_bytes()[:100])
    assert RowChecks.load(path, "key") is None
    assert not list(tmp_path.glob(".checks*"))
