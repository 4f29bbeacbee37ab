import csv
import hashlib
import json
import random

import pytest

from eval.scene_qa import (
    answer_from_images,
    answer_from_texts,
    format_failures,
    held_out_questions,
    is_right,
    main,
    score,
)
from sf_mllm.data.scenes.questions import SceneQuestion
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_sf_llava


def test_questions_are_the_same_every_time_and_of_every_type():
    asked = held_out_questions(200)
    assert len(asked) == 200
    assert asked[:50] == held_out_questions(50)
    assert len({item.question.type for item in asked}) == 9
    assert len({item.index for item in asked}) >= 200 / 3


@pytest.mark.parametrize(
    ("kind", "expected", "answer", "right"),
    [
        ("color", "red", " Red.", True),
        ("color", "red", "dark red", False),
        ("count", "3", "3", True),
        ("description", "a b on the left, a c at the top and a d", "a d, a b on the left and a c at the top", True),
        ("description", "a b on the left and a c at the top", "a b on the left", False),
        ("description", "a b and a b", "a b", False),
    ],
)
def test_what_counts_as_right(kind, expected, answer, right):
    assert is_right(SceneQuestion(kind, "?", expected), answer) == right


def test_scores_by_type_with_the_majority_beside_them():
    asked = held_out_questions(300)
    rng = random.Random(0)
    is_known = [rng.random() < 0.5 for _ in asked]
    answers = [item.question.answer if known else "nothing" for item, known in zip(asked, is_known, strict=True)]
    *types, mean = score(asked, answers)
    for result in types:
        own = [i for i, item in enumerate(asked) if item.question.type == result.type]
        assert result.samples == len(own)
        assert result.accuracy == pytest.approx(sum(is_known[i] for i in own) / len(own))
        expected = [asked[i].question.answer for i in own]
        assert result.majority == pytest.approx(max(map(expected.count, expected)) / len(own))
    assert mean.type == "mean"
    assert mean.accuracy == pytest.approx(sum(result.accuracy for result in types) / len(types))


def test_answers_from_images_do_not_depend_on_the_batch():
    model, processor = make_sf_llava()
    asked = [item for item in held_out_questions(40) if item.question.type != "description"][:6]
    together = answer_from_images(model, processor, asked)
    assert together == answer_from_images(model, processor, asked, batch_size=1)
    assert len(set(together)) > 1


def test_answers_from_texts_do_not_depend_on_the_batch():
    tokenizer = make_tokenizer()
    decoder = make_decoder(vocab_size=len(tokenizer))
    asked = held_out_questions(6)
    together = answer_from_texts(decoder, tokenizer, asked)
    assert together == answer_from_texts(decoder, tokenizer, asked, batch_size=1)
    assert len(set(together)) > 1


def test_the_domains_are_asked_in_their_own_words():
    plain, clutter = held_out_questions(60), held_out_questions(60, "clutter")
    assert {item.domain for item in clutter} == {"clutter"}
    assert not any("letter" in item.question.question for item in plain)
    assert any("letter" in item.question.question for item in clutter)
    model, processor = make_sf_llava()
    short = [item for item in clutter if item.question.type != "description"][:4]
    assert len(answer_from_images(model, processor, short)) == 4


def test_every_wrong_answer_is_told():
    asked = held_out_questions(5)
    right = [item.question.answer for item in asked]
    lines = format_failures(asked, {"image": ["a\r\nb", *right[1:]], "text": right}).splitlines()
    item = asked[0]
    assert [json.loads(line) for line in lines] == [
        {
            "reads": "image",
            "domain": "plain",
            "scene": item.index,
            "type": item.question.type,
            "question": item.question.question,
            "given": "a\r\nb",
            "expected": item.question.answer,
        }
    ]


def test_the_command_writes_one_row_a_type(tmp_path, capsys):
    model, processor = make_sf_llava()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    make_decoder(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    arguments = ["--questions", "12", "--device", "cpu"]
    both = ["--model", str(tmp_path / "model"), "--decoder", str(tmp_path / "decoder")]
    failures = tmp_path / "failures.jsonl"
    assert main([*both, *arguments, "--rows", str(tmp_path), "--failures", str(failures)]) == 0
    with (tmp_path / "scene_qa.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_reader = {reads: [row for row in rows if row["reads"] == reads] for reads in ("image", "text")}
    assert sum(map(len, by_reader.values())) == len(rows)
    for reads, own in by_reader.items():
        assert own[-1]["type"] == "mean"
        assert sum(int(row["samples"]) for row in own[:-1]) == int(own[-1]["samples"]) == 12
        folder = tmp_path / ("model" if reads == "image" else "decoder")
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for row in own:
            assert (row["protocol"], row["precision"], row["model"]) == ("scenes-qa-2", "float32", str(folder))
            assert row["weights_sha256"] == weights[:12]
    wrong = [json.loads(line) for line in failures.read_text().splitlines()]
    assert {row["reads"] for row in wrong} == {"image", "text"}
    out = capsys.readouterr().out
    assert "from words" in out and str(failures) in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "nothing to ask"),
        (["--model", "gone", "--questions", "3"], "gone"),
        (["--model", "gone", "--questions", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(capsys, given, said):
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
