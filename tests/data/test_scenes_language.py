import random
import re
from collections import Counter

import pytest
import torch

from sf_mllm.data.scenes.domains import PLACES, UNIT
from sf_mllm.data.scenes.language import (
    AREA_PHRASES,
    PLACE_PHRASES,
    SceneObject,
    describe,
    describe_briefly,
    describe_for_reading,
    is_clearly,
    is_in_area,
    objects_of,
)
from sf_mllm.data.scenes.phrasings import PHRASINGS
from sf_mllm.data.scenes.questions import QUESTION_TYPES, SceneQuestion, ask_questions, majority_baseline
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes
from tests.data.scene_oracle import TEMPLATES, description_holds, read_question, read_scene, right_answer


@pytest.fixture(scope="module")
def scenes_in_words() -> list[list[SceneObject]]:
    return objects_of(sample_scenes(torch.arange(600), ScenesConfig(seed=12)))


@pytest.fixture(scope="module")
def asked(scenes_in_words) -> list[tuple[list[SceneObject], SceneQuestion]]:
    return [
        (objects, question)
        for index, objects in enumerate(scenes_in_words)
        for question in ask_questions(objects, random.Random(index), 9)
    ]


def test_every_answer_is_right_and_every_reference_unique(asked):
    used = Counter()
    for objects, item in asked:
        understood = read_question(item.type, item.question)
        assert understood, item
        for template, form, parts in understood:
            if item.type == "description":
                assert description_holds(form, item.answer, objects), item
            else:
                assert right_answer(form, parts, objects) == item.answer, item
            used[template] += 1
    assert set(used) == set(TEMPLATES)  # every phrasing is in use


def test_questions_can_be_answered_from_the_reading_text_alone(asked):
    """What a decoder is asked without an image: the best possible score is 100 %."""
    for number, (objects, item) in enumerate(asked):
        told = read_scene(describe_for_reading(objects, random.Random(number)))
        for _, form, parts in read_question(item.type, item.question):
            if form.startswith("description"):
                assert item.answer == (describe_briefly(told) if form == "description_short" else describe(told))
            else:
                assert right_answer(form, parts, told) == item.answer, item


def test_questions_are_varied_and_answers_short(asked):
    counts = Counter(item.type for _, item in asked)
    assert set(counts) == set(QUESTION_TYPES) == {form.split("_")[0] for form in PHRASINGS}
    assert min(counts.values()) > 0.6 * max(counts.values())
    templates = [template for them in PHRASINGS.values() for template in them]
    assert len(set(templates)) == len(templates)
    assert all(len(them) >= 8 for them in PHRASINGS.values())
    for _, item in asked:
        if item.type != "description":
            assert re.fullmatch(r"[a-z-]+( [a-z]+)?|\d", item.answer), item


def test_answers_are_balanced(asked):
    yes_no = {}
    for _, item in asked:
        form = read_question(item.type, item.question)[0][1]
        if item.answer in ("yes", "no"):
            yes_no.setdefault(form, []).append(item.answer == "yes")
    assert len(yes_no) == 9
    for form, answers in yes_no.items():
        assert sum(answers) / len(answers) == pytest.approx(0.5, abs=1.5 / len(answers) ** 0.5), form
    baseline = {kind: share for kind, (_, share) in majority_baseline(item for _, item in asked).items()}
    assert baseline["count"] < 0.4 and baseline["existence"] < 0.55 and baseline["comparison"] < 0.45
    assert baseline["position"] < 0.2 and baseline["relation"] < 0.35 and baseline["size"] < 0.4
    assert max(baseline["color"], baseline["shape"]) < 0.18 and baseline["description"] < 0.02
    numbers = Counter(item.answer for _, item in asked if item.type == "count")
    assert set(numbers) == set("012345678")


def test_questions_come_in_spellings_that_people_type(asked):
    questions = [item.question for _, item in asked]
    in_haste = [question for question in questions if question[-1] not in "?."]
    assert len(in_haste) / len(questions) == pytest.approx(0.1, abs=0.02)
    assert all(question == question.lower() for question in in_haste)
    assert any(re.match("what color is [^t]", question) for question in in_haste)  # without an article
    spelt = Counter(word for question in questions for word in re.findall("colou?r", question.lower()))
    assert spelt["colour"] / spelt.total() == pytest.approx(0.2, abs=0.05)


def test_a_type_that_is_named_twice_comes_twice_as_often(scenes_in_words):
    types = (*QUESTION_TYPES, "relation")
    counts = Counter(
        item.type
        for index, objects in enumerate(scenes_in_words)
        if len(objects) > 3
        for item in ask_questions(objects, random.Random(index), 10, types)
    )
    assert counts["relation"] == pytest.approx(2 * counts["color"], rel=0.1)
    one = ask_questions(scenes_in_words[0], random.Random(0), 3, ("count",))
    assert {item.type for item in one} == {"count"}


def test_questions_follow_the_generator_and_do_not_repeat(scenes_in_words):
    objects = scenes_in_words[0]
    first = ask_questions(objects, random.Random(5), 12)
    assert first == ask_questions(objects, random.Random(5), 12)
    assert first != ask_questions(objects, random.Random(6), 12)
    assert len({item.question for item in first}) == len(first) == 12


def test_descriptions_in_words():
    objects = [
        SceneObject("small", "orange", "star", "right", 3500, 2000),
        SceneObject("medium", "orange", "star", "right", 3000, 2100),
        SceneObject("large", "red", "circle", "top-left", 700, 700),
        SceneObject("medium", "blue", "cross", "bottom", 2000, 3500),
    ]
    assert describe(objects) == (
        "a large red circle in the top-left corner, a medium orange star on the right, a small orange star on the "
        "right and a medium blue cross at the bottom"
    )
    assert describe(objects[:1]) == "a small orange star on the right"
    assert describe_briefly(objects) == "a red circle, an orange star, an orange star and a blue cross"
    told = describe_for_reading(objects, random.Random(0))
    assert sorted(told.removeprefix("Objects: ").removesuffix(".").split("; ")) == [
        "large red circle top left",
        "medium blue cross bottom center",
        "medium orange star middle right",
        "small orange star middle right",
    ]
    assert told != describe_for_reading(objects, random.Random(1))  # in another order


def test_reading_text_holds_the_whole_scene(scenes_in_words):
    for index, objects in enumerate(scenes_in_words[:200]):
        told = read_scene(describe_for_reading(objects, random.Random(index)))
        names = ("size", "color", "shape", "place")
        assert Counter(tuple(getattr(item, name) for name in names) for item in told) == Counter(
            tuple(getattr(item, name) for name in names) for item in objects
        )


def test_areas():
    item = SceneObject("small", "red", "star", "left", UNIT // 4, UNIT // 2)
    inside = {area: is_in_area(item, area) for area in AREA_PHRASES}
    assert inside == {
        "left half": True,
        "right half": False,
        "top half": None,
        "bottom half": None,
        "left third": True,
        "right third": False,
        "top third": False,
        "bottom third": False,
    }
    below = item._replace(y=UNIT - 10)
    assert [is_in_area(below, area) for area in ("top half", "bottom half", "bottom third")] == [False, True, True]


def test_is_clearly_needs_distance_and_another_place():
    a = SceneObject("small", "red", "star", "top-left", 1000, 1000)
    assert is_clearly("left of", a, a._replace(x=1700, place="top"))
    assert not is_clearly("right of", a, a._replace(x=1700, place="top"))
    assert not is_clearly("left of", a, a._replace(x=1340))  # the same column
    assert not is_clearly("left of", a._replace(x=1300), a._replace(x=1300 + UNIT // 10 - 1))  # too close
    assert is_clearly("below", a._replace(y=3000), a)


def test_majority_baseline():
    questions = [
        SceneQuestion("color", "?", "red"),
        SceneQuestion("color", "?", "blue"),
        SceneQuestion("color", "?", "blue"),
        SceneQuestion("count", "?", "2"),
    ]
    assert majority_baseline(questions) == {"color": ("blue", 2 / 3), "count": ("2", 1.0)}


def test_places_match_centres():
    scenes = sample_scenes(torch.arange(100), ScenesConfig(seed=1))
    for objects in objects_of(scenes):
        for item in objects:
            row = ("top", "middle", "bottom")[3 * item.y // UNIT]
            column = ("left", "middle", "right")[3 * item.x // UNIT]
            words = [word for word in (row, column) if word != "middle"]
            assert item.place == ("-".join(words) or "center")
    assert tuple(PLACE_PHRASES) == PLACES
