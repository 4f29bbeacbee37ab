import random
import re
from collections import Counter

import pytest
import torch

from sf_mllm.data import scene_questions
from sf_mllm.data.scene_domains import COLORS, PLACES, SHAPES, SIZES, UNIT
from sf_mllm.data.scene_language import (
    PLACE_PHRASES,
    SceneObject,
    caption,
    describe,
    describe_for_reading,
    is_clearly,
    objects_of,
)
from sf_mllm.data.scene_questions import QUESTION_TYPES, SceneQuestion, ask_questions, majority_baseline
from sf_mllm.data.scene_sampling import ScenesConfig, sample_scenes
from tests.data.scene_oracle import matching, read_phrase, related

NOUN_PHRASE = (
    rf"(?:the |an? )?(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLORS)}) )?"
    rf"(?:object|{'|'.join(SHAPES)})(?:e?s)?(?: (?:{'|'.join(PLACE_PHRASES.values())}))?"
)
GROUPS = {"a": NOUN_PHRASE, "b": NOUN_PHRASE, "r": "left of|right of|above|below", "k": "color|shape|size"}
TEMPLATES = [
    (kind, re.compile(re.sub(r"\\\{(\w)\\\}", lambda name: f"(?P<{name[1]}>{GROUPS[name[1]]})", re.escape(template))))
    for kind, templates in scene_questions._PHRASINGS.items()
    for template in templates
]


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


def the(phrase: str, objects: list[SceneObject]) -> SceneObject:
    """The one object that a definite phrase means."""
    assert phrase.startswith("the ")
    found = matching(read_phrase(phrase), objects)
    assert len(found) == 1, f"'{phrase}' is ambiguous"
    return found[0]


def yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def answer(kind: str, parts: dict[str, str], objects: list[SceneObject]) -> str:
    """Answer a question from its words, independently of how it was made."""
    if kind in ("color", "shape", "size"):
        return getattr(the(parts["a"], objects), kind)
    if kind == "position":
        return the(parts["a"], objects).place
    if kind == "count":
        return str(len(matching(read_phrase(parts["a"]), objects)))
    if kind == "existence":
        return yes(bool(matching(read_phrase(parts["a"]), objects)))
    if kind == "comparison_count":
        more, fewer = (len(matching(read_phrase(parts[name]), objects)) for name in "ab")
        return yes(more > fewer)
    a, b = the(parts["a"], objects), the(parts["b"], objects)
    assert a is not b
    if kind == "relation":
        return yes(related(parts["r"], a, b))
    if kind == "relation_horizontal":
        return "left" if a.x < b.x else "right"
    if kind == "relation_vertical":
        return "above" if a.y < b.y else "below"
    if kind == "comparison":
        return yes(getattr(a, parts["k"]) == getattr(b, parts["k"]))
    assert kind == "comparison_size"
    return yes(SIZES.index(a.size) > SIZES.index(b.size))


def test_every_answer_is_right_and_every_reference_unique(asked):
    used = Counter()
    for objects, item in asked:
        read = [
            (kind, match)
            for kind, template in TEMPLATES
            if kind.split("_")[0] == item.type and (match := template.fullmatch(item.question))
        ]
        assert read, item
        for kind, match in read:
            expected = describe(objects) if kind == "description" else answer(kind, match.groupdict(), objects)
            assert item.answer == expected, item
            used[match.re.pattern] += 1
    assert set(used) == {template.pattern for _, template in TEMPLATES}  # every phrasing is in use


def test_questions_are_varied_and_answers_short(asked):
    counts = Counter(item.type for _, item in asked)
    assert set(counts) == set(QUESTION_TYPES)
    assert min(counts.values()) > 0.6 * max(counts.values())
    for key, templates in scene_questions._PHRASINGS.items():
        assert len(set(templates)) >= 4, key
    for _, item in asked:
        if item.type != "description":
            assert re.fullmatch(r"[a-z-]+|\d", item.answer), item
    for kind in ("existence", "comparison", "relation"):
        answers = Counter(item.answer for _, item in asked if item.type == kind)
        assert answers["yes"] == pytest.approx(answers["no"], rel=0.25), kind


def test_questions_follow_the_generator_and_do_not_repeat(scenes_in_words):
    objects = scenes_in_words[0]
    first = ask_questions(objects, random.Random(5), 12)
    assert first == ask_questions(objects, random.Random(5), 12)
    assert first != ask_questions(objects, random.Random(6), 12)
    assert len({item.question for item in first}) == len(first) == 12


def test_descriptions_in_words():
    objects = [
        SceneObject("small", "orange", "star", "right", 3500, 2000),
        SceneObject("large", "red", "circle", "top-left", 700, 700),
        SceneObject("medium", "blue", "cross", "bottom", 2000, 3500),
    ]
    assert describe(objects) == (
        "a large red circle in the top-left corner, a small orange star on the right "
        "and a medium blue cross at the bottom"
    )
    assert describe(objects[:1]) == "a small orange star on the right"


def test_reading_text_holds_the_whole_scene(scenes_in_words):
    for index, objects in enumerate(scenes_in_words[:200]):
        text = describe_for_reading(objects, random.Random(index))
        phrases = text.removeprefix("The image shows ").removesuffix(".").split("; ")
        told = Counter(tuple(sorted(read_phrase(phrase).items())) for phrase in phrases)
        assert told == Counter(
            tuple(sorted({name: getattr(item, name) for name in ("size", "color", "shape", "place")}.items()))
            for item in objects
        )


def test_captions_are_true(scenes_in_words):
    kinds = Counter()
    for index, objects in enumerate(scenes_in_words):
        text = caption(objects, random.Random(index))
        relation = re.fullmatch(r"(.+) (left of|right of|above|below) (.+)", text)
        if relation:
            first, second = (matching(read_phrase(relation[group]), objects) for group in (1, 3))
            assert any(related(relation[2], a, b) for a in first for b in second), text
            kinds["relation"] += 1
            continue
        for phrase in re.split(r", | and (?=an? )", text):
            assert matching(read_phrase(phrase), objects), text
        kinds["full" if text == describe(objects) else "partial"] += 1
    assert min(kinds[kind] for kind in ("relation", "full", "partial")) > 100


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
