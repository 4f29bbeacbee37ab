"""Put scenes into words, from the attributes alone: noun phrases, relations, descriptions, captions."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from sf_mllm.data.scene_domains import DOMAINS, PLACES, UNIT, plural_noun
from sf_mllm.data.scene_overlap import CLEARLY_HIDDEN
from sf_mllm.data.scene_sampling import RELATION_MARGIN, Scenes


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
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind")
"""Each stands beside its opposite; those of overlapping objects come last."""
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
)
"""Sets of attributes that a phrase may name."""
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


def caption(objects: Sequence[SceneObject], rng: random.Random) -> str:
    """Say something true about a scene: every object in full, some objects with attributes dropped, or a relation."""
    kind = rng.choice(("full", "dropped", "relation"))
    if kind == "relation":
        pairs = [pair for pair in ordered_pairs(objects, rng) if relations_between(*pair)]
        if pairs:
            a, b = pairs[0]
            return f"{noun_phrase(a, FULL)} {rng.choice(relations_between(a, b))} {noun_phrase(b, FULL)}"
    if kind == "dropped":
        some = rng.sample(list(objects), rng.randint(1, len(objects)))
        return _join([noun_phrase(item, rng.choice(REFERRING)) for item in some])
    return describe(objects)


def describe(objects: Sequence[SceneObject]) -> str:
    """List every object with size, colour, shape and place, in reading order of the 3x3 places."""
    ordered = sorted(objects, key=lambda item: (PLACES.index(item.place), item.x, item.y))
    return _join([f"{noun_phrase(item, FULL)} {PLACE_PHRASES[item.place]}" for item in ordered])


def describe_for_reading(objects: Sequence[SceneObject], rng: random.Random) -> str:
    """Return a text that stands in for the image: every question of `ask_questions` can be answered from it.

    The objects come in random order, so that the reader has to look them up.
    """
    shuffled = rng.sample(list(objects), len(objects))
    return "The image shows " + "; ".join(f"{noun_phrase(o, FULL)} {PLACE_PHRASES[o.place]}" for o in shuffled) + "."


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


def plural(size: str | None, color: str | None, shape: str | None) -> str:
    """Build "red circles" or "small objects"; None leaves an attribute out."""
    noun = "objects" if shape is None else plural_noun(shape)
    return " ".join(word for word in (size, color, noun) if word)


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def refer(
    item: SceneObject, objects: Sequence[SceneObject], rng: random.Random, hidden: Sequence[str] = ()
) -> str | None:
    """Return a definite phrase that fits no other object and names none of the hidden attributes, if there is one."""
    if len(objects) == 1 and rng.random() < 0.5:
        return "the object"
    for attributes in rng.sample(REFERRING, len(REFERRING)):
        if any(name in attributes for name in hidden):
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
