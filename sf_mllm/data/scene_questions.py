"""Ask questions about scenes: each has one right answer, each type several phrasings."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sf_mllm.data.scene_domains import COLORS, SHAPES, SIZE_ORDER, SIZES
from sf_mllm.data.scene_language import (
    RELATIONS,
    SceneObject,
    describe,
    noun_phrase,
    ordered_pairs,
    plural,
    refer,
    relations_between,
)


class SceneQuestion(NamedTuple):
    """A question about a scene; `type` is one of QUESTION_TYPES."""

    type: str
    question: str
    answer: str


_PHRASINGS = {
    "color": (
        "What color is {a}?",
        "What is the color of {a}?",
        "Which color does {a} have?",
        "Name the color of {a}.",
    ),
    "shape": (
        "What shape is {a}?",
        "What is the shape of {a}?",
        "Which shape does {a} have?",
        "Name the shape of {a}.",
    ),
    "size": ("What size is {a}?", "What is the size of {a}?", "Which size does {a} have?", "How big is {a}?"),
    "count": (
        "How many {a} are there?",
        "How many {a} do you see?",
        "What is the number of {a}?",
        "Count the {a}.",
    ),
    "existence": (
        "Is there {a}?",
        "Do you see {a}?",
        "Can you see {a} in the image?",
        "Does the image show {a}?",
    ),
    "position": (
        "Where is {a}?",
        "Where in the image is {a}?",
        "What is the position of {a}?",
        "In which part of the image is {a}?",
    ),
    "relation": (
        "Is {a} {r} {b}?",
        "Do you see {a} {r} {b}?",
        "Is it true that {a} is {r} {b}?",
        "Can {a} be found {r} {b}?",
    ),
    "relation_horizontal": (
        "Is {a} to the left or to the right of {b}?",
        "Is {a} left or right of {b}?",
        "Seen from {b}, is {a} left or right?",
        "On which side of {b} is {a}, left or right?",
    ),
    "relation_vertical": (
        "Is {a} above or below {b}?",
        "Seen from {b}, is {a} above or below?",
        "Does {a} lie above or below {b}?",
        "Where is {a}, above or below {b}?",
    ),
    "comparison": (
        "Do {a} and {b} have the same {k}?",
        "Is the {k} of {a} the same as that of {b}?",
        "Are {a} and {b} equal in {k}?",
        "Does {a} have the same {k} as {b}?",
    ),
    "comparison_count": (
        "Are there more {a} than {b}?",
        "Do you see more {a} than {b}?",
        "Is the number of {a} larger than that of {b}?",
        "Does the image show more {a} than {b}?",
    ),
    "comparison_size": (
        "Is {a} bigger than {b}?",
        "Is {a} larger than {b}?",
        "Is {b} smaller than {a}?",
        "Does {a} have a larger size than {b}?",
    ),
    "description": (
        "Describe the image.",
        "What do you see?",
        "What is in the image?",
        "Give a short description of the image.",
    ),
}


def ask_questions(objects: Sequence[SceneObject], rng: random.Random, count: int) -> list[SceneQuestion]:
    """Ask up to `count` different questions, of types drawn evenly; none is ambiguous.

    Args:
        objects: of one scene, at least one.
        rng: decides types, objects and phrasing.
        count: questions wanted; a scene that allows fewer different ones gives fewer.

    Returns:
        Questions with answers of one or two lower-case words, apart from descriptions.
    """
    questions: dict[str, SceneQuestion] = {}
    types: list[str] = []
    for _ in range(4 * count):
        if len(questions) == count:
            break
        if not types:
            types = rng.sample(QUESTION_TYPES, len(QUESTION_TYPES))
        asked = _ASK[types.pop()](objects, rng)
        if asked is not None:
            questions.setdefault(asked.question, asked)
    return list(questions.values())


def majority_baseline(questions: Iterable[SceneQuestion]) -> dict[str, tuple[str, float]]:
    """Return the most frequent answer of each question type and the accuracy of always giving it."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.type, Counter())[question.answer] += 1
    result = {}
    for kind, counter in sorted(answers.items()):
        answer, hits = counter.most_common(1)[0]
        result[kind] = (answer, hits / counter.total())
    return result


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def _phrase(rng: random.Random, key: str, **parts: str | None) -> str:
    return rng.choice(_PHRASINGS[key]).format(**parts)


def _ask_attribute(kind: str) -> Callable[[Sequence[SceneObject], random.Random], SceneQuestion | None]:
    def ask(objects: Sequence[SceneObject], rng: random.Random) -> SceneQuestion | None:
        attribute = "place" if kind == "position" else kind
        for item in rng.sample(list(objects), len(objects)):
            phrase = refer(item, objects, rng, hidden=(attribute,))
            if phrase is not None:
                return SceneQuestion(kind, _phrase(rng, kind, a=phrase), getattr(item, attribute))
        return None

    return ask


def _ask_count(objects: Sequence[SceneObject], rng: random.Random) -> SceneQuestion:
    attributes: tuple[str, ...] = rng.choice(
        ((), ("color",), ("shape",), ("size",), ("color", "shape"), ("size", "color"))
    )
    conditions = {name: getattr(rng.choice(objects), name) for name in attributes}  # from two objects: may be none
    if conditions and rng.random() < 0.1:
        conditions[attributes[0]] = rng.choice({"color": COLORS, "shape": SHAPES, "size": SIZES}[attributes[0]])
    number = sum(all(getattr(item, name) == value for name, value in conditions.items()) for item in objects)
    group = plural(conditions.get("size"), conditions.get("color"), conditions.get("shape"))
    return SceneQuestion("count", _phrase(rng, "count", a=group), str(number))


def _ask_existence(objects: Sequence[SceneObject], rng: random.Random) -> SceneQuestion | None:
    attributes = rng.choice(
        (("color",), ("shape",), ("color", "shape"), ("color", "shape"), ("size", "color", "shape"))
    )
    answer = rng.random() < 0.5
    seen = {tuple(getattr(item, name) for name in attributes) for item in objects}
    item = rng.choice(objects)
    for _ in range(8):
        if answer or tuple(getattr(item, name) for name in attributes) not in seen:
            return SceneQuestion("existence", _phrase(rng, "existence", a=noun_phrase(item, attributes)), _yes(answer))
        # Near misses: attributes of different objects put together, or one of them changed.
        values = {name: getattr(rng.choice(objects), name) for name in attributes}
        if rng.random() < 0.5:
            name = rng.choice(attributes)
            values[name] = rng.choice({"color": COLORS, "shape": SHAPES, "size": SIZES}[name])
        item = item._replace(**values)
    return None


def _ask_relation(objects: Sequence[SceneObject], rng: random.Random) -> SceneQuestion | None:
    for a, b in ordered_pairs(objects, rng):
        relations = relations_between(a, b)
        if not relations:
            continue
        # Place words would give the answer away.
        phrase_a, phrase_b = refer(a, objects, rng, hidden=("place",)), refer(b, objects, rng, hidden=("place",))
        if phrase_a is None or phrase_b is None:
            continue
        relation = rng.choice(relations)
        is_spatial = relation in RELATIONS[:4]
        if rng.random() < 0.5 and is_spatial:
            key = "relation_horizontal" if relation in ("left of", "right of") else "relation_vertical"
            return SceneQuestion("relation", _phrase(rng, key, a=phrase_a, b=phrase_b), relation.split()[0])
        answer = rng.random() < 0.5
        if not answer:
            relation = RELATIONS[RELATIONS.index(relation) ^ 1]  # the opposite one
        return SceneQuestion("relation", _phrase(rng, "relation", a=phrase_a, b=phrase_b, r=relation), _yes(answer))
    return None


def _ask_comparison(objects: Sequence[SceneObject], rng: random.Random) -> SceneQuestion | None:
    form = rng.choice(("same", "size", "count"))
    want = rng.random() < 0.5
    if form == "count":
        name, values = rng.choice((("color", COLORS), ("shape", SHAPES)))
        counts = Counter(getattr(item, name) for item in objects)
        first, second = rng.choice(list(counts)), rng.choice(values)
        if first == second:
            return None
        if (counts[first] > counts[second]) != want:
            first, second = second, first
        groups = [plural(None, **{"color": None, "shape": None, name: value}) for value in (first, second)]
        question = _phrase(rng, "comparison_count", a=groups[0], b=groups[1])
        return SceneQuestion("comparison", question, _yes(counts[first] > counts[second]))
    kind = rng.choice(("color", "shape", "size")) if form == "same" else "size"
    for a, b in ordered_pairs(objects, rng):
        if form == "same":
            answer = getattr(a, kind) == getattr(b, kind)
        else:
            answer = SIZE_ORDER.index(a.size) > SIZE_ORDER.index(b.size)
        if answer != want or (form == "size" and a.size == b.size):
            continue
        phrase_a, phrase_b = refer(a, objects, rng, hidden=(kind,)), refer(b, objects, rng, hidden=(kind,))
        if phrase_a is not None and phrase_b is not None:
            key = "comparison" if form == "same" else "comparison_size"
            return SceneQuestion("comparison", _phrase(rng, key, a=phrase_a, b=phrase_b, k=kind), _yes(answer))
    return None


def _ask_description(objects: Sequence[SceneObject], rng: random.Random) -> SceneQuestion:
    return SceneQuestion("description", _phrase(rng, "description"), describe(objects))


_ASK: dict[str, Callable[[Sequence[SceneObject], random.Random], SceneQuestion | None]] = {
    "color": _ask_attribute("color"),
    "shape": _ask_attribute("shape"),
    "size": _ask_attribute("size"),
    "count": _ask_count,
    "existence": _ask_existence,
    "position": _ask_attribute("position"),
    "relation": _ask_relation,
    "comparison": _ask_comparison,
    "description": _ask_description,
}
QUESTION_TYPES = tuple(_ASK)
