"""Zero-shot tasks, texts and questions about cluttered scenes."""

import random
from collections import Counter

import pytest
import torch

from sf_mllm.data.scenes.captions import full_captions
from sf_mllm.data.scenes.domains import GLYPHS, SHAPES, SIZE_ORDER, TEXTURES
from sf_mllm.data.scenes.language import describe, describe_briefly, describe_for_reading, objects_of
from sf_mllm.data.scenes.questions import ask_questions
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes
from sf_mllm.data.scenes.tasks import build_tasks
from sf_mllm.data.scenes.words import WORDS, tokenize
from tests.data.scene_oracle import (
    caption_holds,
    description_holds,
    join_glyphs,
    read_question,
    read_scene,
    right_answer,
)

SAMPLES = 40
CHANCE = {
    "color": 1 / 8,
    "texture": 1 / 4,
    "shape": 1 / 8,
    "glyph": 1 / 36,
    "tiny_glyph": 1 / 36,
    "size": 1 / 4,
    "count": 1 / 8,
    "one_attribute": None,  # 4, 8 or 36 texts
    "swap": 1 / 2,
    "position": 1 / 9,
    "relation": 1 / 2,
    "front": 1 / 2,
    "retrieval": 1 / SAMPLES,
}


@pytest.fixture(scope="module")
def tasks():
    return {task.name: task for task in build_tasks(SAMPLES, seed=99, task_set="clutter")}


@pytest.fixture(scope="module")
def scenes_in_words():
    return objects_of(sample_scenes(torch.arange(200), ScenesConfig(seed=12, domain="clutter")))


def test_each_sample_has_exactly_one_true_text(tasks):
    assert list(tasks) == list(CHANCE)
    for name, task in tasks.items():
        assert task.images.scenes.domain == "clutter" and len(task) == SAMPLES
        assert CHANCE[name] is None or task.chance == pytest.approx(CHANCE[name])
        if name == "retrieval":
            continue
        rows = zip(objects_of(task.images.scenes), task.choices.tolist(), task.answers.tolist(), strict=True)
        for objects, choices, answer in rows:
            given = [choice for choice in choices if choice >= 0]
            truth = [caption_holds(task.texts[choice], objects) for choice in given]
            assert truth == [choice == answer for choice in given], (name, [task.texts[c] for c in given], objects)
    numbers = Counter((tasks["one_attribute"].choices >= 0).sum(dim=1).tolist())
    assert set(numbers) == {4, 8, 36}


def test_retrieval_captions_are_the_full_captions(tasks):
    task = tasks["retrieval"]
    tokens = tokenize(full_captions(task.images.scenes, task.images.scenes.count > 0))
    for answer, row in zip(task.answers.tolist(), tokens.tolist(), strict=True):
        words = [WORDS[token] for token in row if WORDS[token][0] != "<"]
        assert join_glyphs(task.texts[answer]).split() == words


def test_tasks_show_what_they_ask_for(tasks):
    scenes = {name: task.images.scenes for name, task in tasks.items()}
    assert (scenes["tiny_glyph"].size[:, 0] == SIZE_ORDER.index("tiny")).all()
    assert (scenes["glyph"].size[:, 0] > SIZE_ORDER.index("tiny")).all()
    assert (scenes["glyph"].shape[:, 0] >= len(SHAPES)).all() and (scenes["shape"].shape[:, 0] < len(SHAPES)).all()
    assert (scenes["front"].hidden >= 50).flatten(1).any(dim=1).all()


def test_answers_cannot_be_guessed_from_the_words(tasks):
    for name, number in (("texture", 4), ("size", 4), ("color", 8), ("shape", 8), ("count", 8)):
        most = Counter(tasks[name].answers.tolist()).most_common(1)[0][1]
        assert most < SAMPLES * (1 / number + 0.2), name
    for text in (tasks["front"].texts[answer] for answer in tasks["front"].answers):
        first, second = (text.split(" in front of ") + text.split(" behind "))[-2:]
        assert ("letter" in first or "digit" in first) == ("letter" in second or "digit" in second)


def test_questions_have_right_answers_from_the_scene_and_from_words_alone(scenes_in_words):
    overlaps, shapes, textures = Counter(), Counter(), Counter()
    for index, objects in enumerate(scenes_in_words):
        told = read_scene(describe_for_reading(objects, random.Random(index)))
        for item in ask_questions(objects, random.Random(index), 9):
            understood = read_question(item.type, item.question)
            assert understood, item
            for _, form, parts in understood:
                if item.type == "description":
                    assert description_holds(form, item.answer, objects)
                    assert item.answer == (describe_briefly if form == "description_short" else describe)(told)
                    continue
                assert right_answer(form, parts, objects) == right_answer(form, parts, told) == item.answer, item
                if form == "relation" and parts["r"] in ("in front of", "behind"):
                    overlaps[item.answer] += 1
            if item.type == "shape":
                shapes[item.answer] += 1
            textures.update(word for word in item.question.split() if word in TEXTURES)
    assert min(overlaps["yes"], overlaps["no"]) > 3
    assert len(set(shapes) & set(GLYPHS)) > 15
    assert set(textures) == set(TEXTURES)
