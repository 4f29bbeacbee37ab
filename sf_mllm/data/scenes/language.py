"""Put scenes into words, from the attributes alone: noun phrases, areas, relations, descriptions."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sf_mllm.data.scenes.domains import DOMAINS, PLACES, UNIT, plural_noun
from sf_mllm.data.scenes.overlap import CLEARLY_HIDDEN
from sf_mllm.data.scenes.sampling import RELATION_MARGIN, Scenes


class SceneObject(NamedTuple):
    """One object of a scene in words, with its centre in scene units."""

    size: str
    color: str
    shape: str
    place: str
    x: int
    y: int
    texture: str | None = None  # where the domain has textures
    slot: int = 0  # number in the scene
    hides: frozenset[int] = frozenset()  # slots of the objects that it clearly lies in front of


PLACE_PHRASES = {
    "top-left": "in the top-left corner",
    "top": "at the top",
    "top-right": "in the top-right corner",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom-left": "in the bottom-left corner",
    "bottom": "at the bottom",
    "bottom-right": "in the bottom-right corner",
}
AREA_PHRASES = {
    "left half": ("in the left half", "in the left half of the image"),
    "right half": ("in the right half", "in the right half of the image"),
    "top half": ("in the top half", "in the upper half of the image"),
    "bottom half": ("in the bottom half", "in the lower half of the image"),
    "left third": ("in the left third", "in the left third of the image"),
    "right third": ("in the right third", "in the right third of the image"),
    "top third": ("in the top third", "in the upper third of the image"),
    "bottom third": ("in the bottom third", "in the lower third of the image"),
}
"""Parts of the image larger than a place, and how they are called."""
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind")
"""Each stands beside its opposite; those of overlapping objects come last."""
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
REFERRING = (
    ("shape",),
    ("color",),
    ("color", "shape"),
    ("size", "shape"),
    ("size", "color"),
    ("size", "color", "shape"),
    ("place",),
    ("shape", "place"),
    ("color", "place"),
    ("texture", "shape"),
    ("color", "texture"),
)
"""Sets of attributes that a phrase may name; those with a texture are for domains that have textures."""
FULL = ("size", "color", "texture", "shape")


def objects_of(scenes: Scenes) -> list[list[SceneObject]]:
    """Return the objects of each scene in words, in slot order."""
    attributes = DOMAINS[scenes.domain].attributes
    values = {name: getattr(scenes, name).tolist() for name in (*attributes, "x", "y")}
    hides = (scenes.hidden >= CLEARLY_HIDDEN).tolist()

    def describe_slot(scene: int, slot: int) -> SceneObject:
        names = {name: words[values[name][scene][slot]] for name, words in attributes.items()}
        hidden = frozenset(other for other, is_hidden in enumerate(hides[scene][slot]) if is_hidden)
        x, y = values["x"][scene][slot], values["y"][scene][slot]
        return SceneObject(**names, x=x, y=y, slot=slot, hides=hidden)

    return [[describe_slot(scene, slot) for slot in range(count)] for scene, count in enumerate(scenes.count.tolist())]


def describe(objects: Sequence[SceneObject]) -> str:
    """List every object with size, colour, shape and place, in reading order of the 3x3 places."""
    return _join([noun_phrase(item, (*FULL, "place")) for item in _in_reading_order(objects)])


def describe_briefly(objects: Sequence[SceneObject]) -> str:
    """List every object with colour and shape, in the order of `describe`."""
    return _join([noun_phrase(item, ("color", "shape")) for item in _in_reading_order(objects)])


def describe_for_reading(objects: Sequence[SceneObject], rng: random.Random) -> str:
    """Return a text that stands in for the image: every question of `ask_questions` can be answered from it.

    "Objects: small red circle top left; large blue star middle center." Each object takes the same few words in the
    same order. The objects come in random order, so that the reader has to look them up; behind them, the pairs that
    overlap: "small red circle top left in front of large blue star middle center".
    """
    shuffled = rng.sample(list(objects), len(objects))
    told = [_for_reading(item) for item in shuffled]
    told += [
        f"{_for_reading(front)} in front of {_for_reading(back)}"
        for front, back in ordered_pairs(shuffled, rng)
        if back.slot in front.hides
    ]
    return "Objects: " + "; ".join(told) + "."


def _for_reading(item: SceneObject) -> str:
    cell = PLACES.index(item.place)
    words = [getattr(item, name) for name in FULL]
    words += [("top", "middle", "bottom")[cell // 3], ("left", "center", "right")[cell % 3]]
    return " ".join(word for word in words if word)


def _in_reading_order(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """Sort by place; objects in one place by their words, so that a description depends on words alone."""
    return sorted(objects, key=lambda item: (PLACES.index(item.place), noun_phrase(item, FULL)))


def is_in_area(item: SceneObject, area: str) -> bool | None:
    """Tell whether an object lies in an area of AREA_PHRASES; None for one in the middle third, of a half.

    So the place words alone decide it.
    """
    side, part = area.split()
    third = 3 * (item.x if side in ("left", "right") else item.y) // UNIT
    if part == "half" and third == 1:
        return None
    return third == (0 if side in ("left", "top") else 2)


def is_clearly(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Tell whether a relation holds between `a` and `b` beyond doubt.

    Left of, right of, above and below: the centres differ by a margin and lie in different columns or rows of the 3x3
    places, so that the place words alone decide it too. In front of and behind: one hides a visible part of the other.
    """
    if relation in ("in front of", "behind"):
        front, back = (a, b) if relation == "in front of" else (b, a)
        return back.slot in front.hides
    horizontal = relation in ("left of", "right of")
    delta, delta_cell = (
        (b.x - a.x, 3 * b.x // UNIT - 3 * a.x // UNIT) if horizontal else (b.y - a.y, 3 * b.y // UNIT - 3 * a.y // UNIT)
    )
    sign = 1 if relation in ("left of", "above") else -1
    return sign * delta >= RELATION_MARGIN and sign * delta_cell >= 1


def noun_phrase(item: SceneObject, attributes: Sequence[str], article: str = "a") -> str:
    """Build "a small red circle on the left" from the attributes named."""
    values = [getattr(item, name) for name in ("size", "color", "texture") if name in attributes]
    words = [value for value in values if value is not None]
    words.append(item.shape if "shape" in attributes else "object")
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    if "place" in attributes:
        words.append(PLACE_PHRASES[item.place])
    return " ".join((article, *words))


def plural(conditions: Mapping[str, str]) -> str:
    """Build "red circles" or "small striped objects" from the attributes named."""
    noun = plural_noun(conditions["shape"]) if "shape" in conditions else "objects"
    return " ".join([*(conditions[name] for name in ("size", "color", "texture") if name in conditions), noun])


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def refer(
    item: SceneObject, objects: Sequence[SceneObject], rng: random.Random, hidden: Sequence[str] = ()
) -> str | None:
    """Return a definite phrase that fits no other object and names none of the hidden attributes, if there is one."""
    if len(objects) == 1 and rng.random() < 0.5:
        return "the object"
    for attributes in rng.sample(REFERRING, len(REFERRING)):
        if any(name in attributes for name in hidden) or ("texture" in attributes and item.texture is None):
            continue
        target = [getattr(item, name) for name in attributes]
        if sum([getattr(other, name) for name in attributes] == target for other in objects) == 1:
            return noun_phrase(item, attributes, article="the")
    return None


def ordered_pairs(objects: Sequence[SceneObject], rng: random.Random) -> list[tuple[SceneObject, SceneObject]]:
    """Return all ordered pairs of different objects in random order."""
    pairs = [(a, b) for i, a in enumerate(objects) for j, b in enumerate(objects) if i != j]
    rng.shuffle(pairs)
    return pairs


def relations_between(a: SceneObject, b: SceneObject) -> list[str]:
    """Return the RELATIONS that clearly hold between `a` and `b`: up to three."""
    return [relation for relation in RELATIONS if is_clearly(relation, a, b)]
