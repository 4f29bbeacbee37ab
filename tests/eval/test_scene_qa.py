import csv
import hashlib
import random

import pytest

from eval.scene_qa import answer_from_images, answer_from_texts, held_out_questions, is_right, main, score
from sf_mllm.data.scene_questions import SceneQuestion
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


def test_the_command_writes_one_row_a_type(tmp_path, capsys):
    model, processor = make_sf_llava()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--questions", "12", "--device", "cpu"]
    assert main([*arguments, "--rows", str(tmp_path), "--failures", "1"]) == 0
    with (tmp_path / "scene_qa.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["type"] == "mean"
    assert sum(int(row["samples"]) for row in rows[:-1]) == int(rows[-1]["samples"]) == 12
    weights = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    for row in rows:
        assert (row["protocol"], row["reads"], row["precision"]) == ("scenes-qa-1", "image", "float32")
        assert row["weights_sha256"] == weights[:12]
    assert "expected:" in capsys.readouterr().out
    assert main(["--model", str(tmp_path / "gone"), "--questions", "3"]) == 2
