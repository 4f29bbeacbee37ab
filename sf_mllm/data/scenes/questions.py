"""Ask questions about scenes: each has one right answer, each type several forms and many phrasings."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

from sf_mllm.data.scenes.domains import COLORS, SHAPES, SIZE_ORDER, SIZES, TEXTURES
from sf_mllm.data.scenes.language import (
    AREA_PHRASES,
    RELATION_PHRASES,
    RELATIONS,
    SceneObject,
    describe,
    describe_briefly,
    is_in_area,
    noun_phrase,
    ordered_pairs,
    plural,
    refer,
    relations_between,
)
from sf_mllm.data.scenes.phrasings import phrase


class SceneQuestion(NamedTuple):
    """A question about a scene; `type` is one of QUESTION_TYPES."""

    type: str
    question: str
    answer: str


Objects = Sequence[SceneObject]
Group = tuple[tuple[str, str], ...]
"""Attributes and values that objects have in common."""
Ask = Callable[[Objects, random.Random], SceneQuestion | None]
"""Asks one question, or None where the scene allows none of the form that was drawn."""

_VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "texture": TEXTURES}
_COUNT_CONDITIONS = ((), ("color",), ("shape",), ("size",), ("size", "color"), ("size", "shape"), ("color", "shape"))
_EXISTENCE_CONDITIONS = (("color",), ("shape",), ("size", "shape"), ("color", "shape"), ("size", "color", "shape"))
_COMPARED = ("color", "shape", "size")
_ALL_SAME = tuple((kind, name) for kind in _COMPARED for name in (None, *_COMPARED) if kind != name)
"""Attribute that may be the same, and the one that makes the group (all objects if None)."""
_AREA_SHARE = 0.3  # of the questions of a type that may ask about a part of the image
# How often "yes" is asked for, in forms where scenes allow "no" more often: so that half of what is asked is "yes".
_YES_WANTED = {
    "all_same": 0.57,
    "equal": 0.55,
    "existence": 0.46,
    "existence_area": 0.6,
    "more": 0.54,
    "position_area": 0.55,
    "same": 0.55,
}


def ask_questions(
    objects: Objects, rng: random.Random, count: int, types: Sequence[str] | None = None
) -> list[SceneQuestion]:
    """Ask up to `count` different questions, of types drawn evenly; none is ambiguous.

    Args:
        objects: of one scene, at least one.
        rng: decides types, objects and phrasing.
        count: questions wanted; a scene that allows fewer different ones gives fewer.
        types: to draw from, each QUESTION_TYPES if None; a type that stands there twice comes twice as often.

    Returns:
        Questions with answers of one or two lower-case words, apart from descriptions.
    """
    types = QUESTION_TYPES if types is None else types
    questions: dict[str, SceneQuestion] = {}
    waiting: list[str] = []
    for _ in range(4 * count):
        if len(questions) == count:
            break
        if not waiting:
            waiting = rng.sample(types, len(types))
        asked = _ASK[waiting.pop()](objects, rng)
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


def _question(rng: random.Random, form: str, answer: str, **parts: str) -> SceneQuestion:
    kind = form.split("_")[0]
    if "w" in parts:
        form = f"{kind}_area"
    return SceneQuestion(kind, phrase(rng, form, **parts), answer)


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def _ask_attribute(kind: str) -> Ask:
    def ask(objects: Objects, rng: random.Random) -> SceneQuestion | None:
        for item, name in _named(objects, rng, hidden=kind):
            return _question(rng, kind, getattr(item, kind), a=name)
        return None

    return ask


def _named(objects: Objects, rng: random.Random, hidden: str) -> Iterable[tuple[SceneObject, str]]:
    """Yield objects in random order with a phrase for each that does not name the hidden attribute."""
    for item in rng.sample(list(objects), len(objects)):
        name = refer(item, objects, rng, hidden=(hidden,))
        if name is not None:
            yield item, name


def _ask_position(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    asks_area, wanted = rng.random() < 2 * _AREA_SHARE, rng.random() < _YES_WANTED["position_area"]
    for item, name in _named(objects, rng, hidden="place"):
        if not asks_area:
            return _question(rng, "position", item.place, a=name)
        sides = [area for area in AREA_PHRASES if area.endswith("half") and is_in_area(item, area)]
        if sides and rng.random() < 0.5:
            side = rng.choice(sides).split()[0]
            form = "position_horizontal" if side in ("left", "right") else "position_vertical"
            return _question(rng, form, side, a=name)
        areas = [area for area in AREA_PHRASES if is_in_area(item, area) is wanted]
        if areas:
            return _question(rng, "position", _yes(wanted), a=name, **_where(rng, rng.choice(areas)))
    return None


def _ask_count(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    area = _draw_area(rng)
    by_number: dict[int, list[Group]] = defaultdict(list)
    for attributes in rng.sample(_COUNT_CONDITIONS, 3):
        for group, members in _groups(objects, rng, attributes):
            number = _count(members, area)
            if number is not None:
                by_number[number].append(group)
    if not by_number:
        return None
    # Most groups have one member or none: so the larger a number that the scene offers, the likelier.
    number = rng.choices(list(by_number), [1 + offered for offered in by_number])[0]
    parts = {"g": plural(dict(rng.choice(by_number[number])))}
    return _question(rng, "count", str(number), **parts, **_where(rng, area))


def _ask_existence(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    area = _draw_area(rng)
    wanted = rng.random() < _YES_WANTED["existence" if area is None else "existence_area"]
    fitting = []
    for group, members in _groups(objects, rng, rng.choice(_EXISTENCE_CONDITIONS)):
        number = _count(members, area)
        if number is not None and (number > 0) == wanted:
            fitting.append(group)
    if not fitting:
        return None
    conditions: dict[str, Any] = dict(rng.choice(fitting))
    parts = {"a": noun_phrase(objects[0]._replace(**conditions), tuple(conditions)), "g": plural(conditions)}
    return _question(rng, "existence", _yes(wanted), **parts, **_where(rng, area))


def _draw_area(rng: random.Random) -> str | None:
    return rng.choice(list(AREA_PHRASES)) if rng.random() < _AREA_SHARE else None


def _where(rng: random.Random, area: str | None) -> dict[str, str]:
    return {} if area is None else {"w": rng.choice(AREA_PHRASES[area])}


def _groups(
    objects: Objects, rng: random.Random, attributes: Sequence[str]
) -> Iterator[tuple[Group, list[SceneObject]]]:
    """Combine the values that the scene shows, and one that it may not show; yield each group with its members.

    In a domain with textures one of the attributes may give way to it.
    """
    if objects[0].texture is not None and attributes and rng.random() < 0.3:
        attributes = [*attributes[:-1], "texture"]
    members = defaultdict(list)
    for item in objects:
        members[tuple([getattr(item, name) for name in attributes])].append(item)
    shown = [sorted(set(values)) for values in zip(*members, strict=True)]
    for name, values in zip(attributes, shown, strict=False):  # without attributes nothing is shown
        other = rng.choice(_VALUES[name])
        if other not in values:
            values.append(other)
    for combination in product(*shown):
        yield tuple(zip(attributes, combination, strict=True)), members.get(combination, [])


def _count(members: Objects, area: str | None) -> int | None:
    """Count objects in an area; None where one of them is neither clearly inside nor outside."""
    if area is None:
        return len(members)
    inside = [is_in_area(item, area) for item in members]
    return None if None in inside else sum(map(bool, inside))


def _ask_relation(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    for a, b in ordered_pairs(objects, rng):
        relations = relations_between(a, b)
        if not relations:
            continue
        # Place words would give the answer away.
        names = [refer(item, objects, rng, hidden=("place",)) for item in (a, b)]
        if names[0] is None or names[1] is None:
            continue
        parts = {"a": names[0], "b": names[1]}
        relation = rng.choice(relations)
        is_spatial = relation in RELATIONS[:4]
        if rng.random() < 0.4 and is_spatial:
            form = "relation_horizontal" if relation in ("left of", "right of") else "relation_vertical"
            return _question(rng, form, relation.split()[0], **parts)
        answer = rng.random() < 0.5
        if not answer:
            relation = RELATIONS[RELATIONS.index(relation) ^ 1]  # the opposite one
        return _question(rng, "relation", _yes(answer), r=rng.choice(RELATION_PHRASES[relation]), **parts)
    return None


def _ask_comparison(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    forms = (_compare_attribute, _compare_attribute, _compare_sizes, _compare_counts, _compare_all)
    for compare in rng.sample(forms, len(forms)):
        asked = compare(objects, rng)
        if asked is not None:
            return asked
    return None


def _compare_attribute(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    kind, wanted = rng.choice(_COMPARED), rng.random() < _YES_WANTED["same"]
    for a, b in ordered_pairs(objects, rng):
        if (getattr(a, kind) == getattr(b, kind)) == wanted:
            names = [refer(item, objects, rng, hidden=(kind,)) for item in (a, b)]
            if names[0] is not None and names[1] is not None:
                return _question(rng, "comparison_same", _yes(wanted), a=names[0], b=names[1], k=kind)
    return None


def _compare_sizes(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    """Compare two objects of different sizes; those of one size may differ by a pixel."""
    asks_which, wanted = rng.random() < 0.5, rng.random() < 0.5
    hidden = ("size", "place") if asks_which else ("size",)  # an answer repeats a phrase, which has to be short
    for a, b in ordered_pairs(objects, rng):
        if a.size == b.size or (SIZE_ORDER.index(a.size) > SIZE_ORDER.index(b.size)) != wanted:
            continue
        names = [refer(item, objects, rng, hidden=hidden) for item in (a, b)]
        if names[0] is None or names[1] is None:
            continue
        if asks_which:
            larger = (names[0] if wanted else names[1]).removeprefix("the ")
            return _question(rng, "comparison_which_larger", larger, a=names[0], b=names[1])
        return _question(rng, "comparison_larger", _yes(wanted), a=names[0], b=names[1])
    return None


def _compare_counts(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    form = rng.choice(("more", "equal", "which_more"))
    wanted = rng.random() < _YES_WANTED.get(form, 0.5)
    for attribute in rng.sample(_COMPARED, len(_COMPARED)):
        numbers = {plural(dict(group)): len(members) for group, members in _groups(objects, rng, (attribute,))}
        pairs = []
        for first, second in permutations(numbers, 2):
            difference = numbers[first] - numbers[second]
            fits = {"more": (difference > 0) == wanted, "equal": (difference == 0) == wanted}
            if fits.get(form, difference != 0) and numbers[first] + numbers[second] > 0:
                pairs.append((first, second))
        if pairs:
            first, second = rng.choice(pairs)
            answer = max(first, second, key=numbers.__getitem__) if form == "which_more" else _yes(wanted)
            return _question(rng, f"comparison_{form}", answer, g=first, h=second)
    return None


def _compare_all(objects: Objects, rng: random.Random) -> SceneQuestion | None:
    """Ask whether a group of two or more agrees in an attribute."""
    wanted = rng.random() < _YES_WANTED["all_same"]
    for kind, name in rng.sample(_ALL_SAME, len(_ALL_SAME)):
        groups = [
            group
            for group, members in _groups(objects, rng, (name,) if name else ())
            if len(members) > 1 and (len({getattr(item, kind) for item in members}) == 1) == wanted
        ]
        if groups:
            return _question(rng, "comparison_all_same", _yes(wanted), g=plural(dict(rng.choice(groups))), k=kind)
    return None


def _ask_description(objects: Objects, rng: random.Random) -> SceneQuestion:
    if rng.random() < 0.5:
        return _question(rng, "description_short", describe_briefly(objects))
    return _question(rng, "description", describe(objects))


_ASK: dict[str, Ask] = {
    "color": _ask_attribute("color"),
    "shape": _ask_attribute("shape"),
    "size": _ask_attribute("size"),
    "count": _ask_count,
    "existence": _ask_existence,
    "position": _ask_position,
    "relation": _ask_relation,
    "comparison": _ask_comparison,
    "description": _ask_description,
}
QUESTION_TYPES = tuple(_ASK)
