"""Zero-shot samples: texts about a scene of which exactly one is true, from the scene's objects in words."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from sf_mllm.data.scenes.domains import COLORS, GLYPHS, MAX_OBJECTS, PLACES, SHAPES, SIZE_ORDER, SIZES, TEXTURES
from sf_mllm.data.scenes.language import RELATIONS, SceneObject, is_clearly, ordered_pairs, relations_between

Item = tuple[list[str], int]
"""Texts and the place of the true one."""
Builder = Callable[[Sequence[SceneObject], random.Random], Item | None]
"""Makes a sample of a scene, or None where the scene allows no unambiguous one."""
Builders = dict[str, tuple[Builder, int, int]]
"""Tasks by name: builder, fewest and most objects."""


def _shuffled(right: str, wrong: Sequence[str], rng: random.Random) -> Item:
    """Put the true text at a random place: a model that finds all texts equal must score at chance."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return choices, choices.index(right)


def _named(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _named_with_texture(item: SceneObject) -> str:
    return " ".join(word for word in (item.color, item.texture, item.shape) if word)


def _shows_texture(item: SceneObject) -> bool:
    """Say in words what `sampling.shows_texture` says."""
    return item.size not in (("tiny", "small") if item.shape in GLYPHS else ("tiny",))


def _unique(objects: Sequence[SceneObject], rng: random.Random) -> list[SceneObject]:
    """Objects whose colour and shape together fit no other object, in random order."""
    counts = Counter(_named(item) for item in objects)
    return [item for item in rng.sample(list(objects), len(objects)) if counts[_named(item)] == 1]


def _ask_value(attribute: str, values: Sequence[str], sizes: Sequence[str] = SIZE_ORDER) -> Builder:
    """Ask for an attribute of the only object, if its value is one of `values` and its size one of `sizes`."""

    def ask(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
        value = getattr(objects[0], attribute)
        if value not in values or objects[0].size not in sizes:
            return None
        texts = list(values) if attribute == "shape" else [f"{value} object" for value in values]
        return texts, values.index(value)

    return ask


def _ask_count(objects: Sequence[SceneObject], rng: random.Random) -> Item:
    texts = ["1 object"] + [f"{number} objects" for number in range(2, MAX_OBJECTS + 1)]
    return texts, len(objects) - 1


def _ask_texture(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
    # Objects whose texture could not be seen are all plain: with them, "plain" would be a good guess.
    return _ask_value("texture", TEXTURES)(objects, rng) if _shows_texture(objects[0]) else None


def _ask_one_of(*attributes: str) -> Builder:
    """Ask for one attribute of an object among others; the other values name no object of the scene."""

    def ask(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
        attribute = rng.choice(attributes)
        name = _named_with_texture if attribute == "texture" else _named
        present = {name(item) for item in objects}
        for item in rng.sample(list(objects), len(objects)):
            shapes = GLYPHS if item.shape in GLYPHS else SHAPES
            values = {"color": COLORS, "shape": shapes, "texture": TEXTURES}[attribute]
            texts = [name(item._replace(**{attribute: value})) for value in values]  # type: ignore[arg-type]
            is_fit = attribute != "texture" or _shows_texture(item)
            if is_fit and sum(text in present for text in texts) == 1:
                return texts, values.index(getattr(item, attribute))
        return None

    return ask


def _ask_swap(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
    present = {(item.color, item.shape) for item in objects}
    for a, b in ordered_pairs(objects, rng):
        if not {(a.color, b.shape), (b.color, a.shape)} & present:
            right = f"{_named(a)} {_named(b)}"
            return _shuffled(right, [f"{b.color} {a.shape} {a.color} {b.shape}"], rng)
    return None


def _ask_position(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
    for item in _unique(objects, rng):
        return [f"{_named(item)} {place}" for place in PLACES], PLACES.index(item.place)
    return None


def _ask_relation(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
    for a, b in ordered_pairs(_unique(objects, rng), rng):
        relations = [relation for relation in relations_between(a, b) if relation in RELATIONS[:4]]
        if relations:
            relation = rng.choice(relations)
            opposite = RELATIONS[RELATIONS.index(relation) ^ 1]
            return _shuffled(f"{_named(a)} {relation} {_named(b)}", [f"{_named(a)} {opposite} {_named(b)}"], rng)
    return None


def _ask_front(objects: Sequence[SceneObject], rng: random.Random) -> Item | None:
    for a, b in ordered_pairs(_unique(objects, rng), rng):
        if (a.shape in GLYPHS) != (b.shape in GLYPHS):
            continue  # glyphs are more often in front of shapes than behind them: the words alone would tell
        for relation in ("in front of", "behind"):
            if is_clearly(relation, a, b):
                return _shuffled(f"{_named(a)} {relation} {_named(b)}", [f"{_named(b)} {relation} {_named(a)}"], rng)
    return None


def caption(objects: Sequence[SceneObject], rng: random.Random) -> Item:
    """The full caption of `sf_mllm.data.scenes.captions` in words; `build_tasks` adds the other samples' captions."""
    number = f"{len(objects)} object{'s' if len(objects) > 1 else ''}"
    names_size = objects[0].texture is not None or len(objects) < MAX_OBJECTS
    phrases = [f"{item.size} {_named_with_texture(item)} {item.place}" for item in objects]
    if not names_size:
        phrases = [f"{_named(item)} {item.place}" for item in objects]
    return [" ".join((number, *phrases))], 0


SCENES: Builders = {
    "color": (_ask_value("color", COLORS), 1, 1),
    "shape": (_ask_value("shape", SHAPES), 1, 1),
    "size": (_ask_value("size", SIZES), 1, 1),
    "count": (_ask_count, 1, MAX_OBJECTS),
    "one_attribute": (_ask_one_of("color", "shape"), 2, MAX_OBJECTS),
    "swap": (_ask_swap, 2, MAX_OBJECTS),
    "position": (_ask_position, 1, MAX_OBJECTS),
    "relation": (_ask_relation, 2, MAX_OBJECTS),
    "retrieval": (caption, 1, MAX_OBJECTS),
}
CLUTTER: Builders = {
    "color": (_ask_value("color", COLORS), 1, 1),
    "texture": (_ask_texture, 1, 1),
    "shape": (_ask_value("shape", SHAPES), 1, 1),
    "glyph": (_ask_value("shape", GLYPHS, sizes=SIZES), 1, 1),
    "tiny_glyph": (_ask_value("shape", GLYPHS, sizes=("tiny",)), 1, 1),
    "size": (_ask_value("size", SIZE_ORDER), 1, 1),
    "count": (_ask_count, 1, MAX_OBJECTS),
    "one_attribute": (_ask_one_of("color", "shape", "texture"), 2, MAX_OBJECTS),
    "swap": (_ask_swap, 2, MAX_OBJECTS),
    "position": (_ask_position, 1, MAX_OBJECTS),
    "relation": (_ask_relation, 2, MAX_OBJECTS),
    "front": (_ask_front, 2, MAX_OBJECTS),
    "retrieval": (caption, 1, MAX_OBJECTS),
}
