"""An independent reader of scene phrases, captions, descriptions and questions, to check what the package writes."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import permutations

from sf_mllm.data.scenes.domains import COLORS, GLYPHS, PLACES, SHAPES, SIZE_ORDER, SIZES, TEXTURES, UNIT
from sf_mllm.data.scenes.language import AREA_PHRASES, PLACE_PHRASES, RELATION_PHRASES, SceneObject
from sf_mllm.data.scenes.phrasings import PHRASINGS

_NOUNS = {"object": None, **{shape: shape for shape in SHAPES}, **{name.replace(" ", "_"): name for name in GLYPHS}}
_PLURAL_NOUNS = {
    "objects": None,
    **{f"{shape}es" if shape == "cross" else f"{shape}s": shape for shape in SHAPES},
    **{name.replace(" ", "s_"): name for name in GLYPHS},
}
_RELATIONS = {
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
    "in front of": lambda a, b: b.slot in a.hides,
    "behind": lambda a, b: a.slot in b.hides,
}
_AREAS = {
    "left half": lambda item: 2 * item.x < UNIT,
    "right half": lambda item: 2 * item.x > UNIT,
    "top half": lambda item: 2 * item.y < UNIT,
    "bottom half": lambda item: 2 * item.y > UNIT,
    "left third": lambda item: 3 * item.x < UNIT,
    "right third": lambda item: 3 * item.x > 2 * UNIT,
    "top third": lambda item: 3 * item.y < UNIT,
    "bottom third": lambda item: 3 * item.y > 2 * UNIT,
}

_NOUN = rf"(?:objects?|(?:{'|'.join(SHAPES)})(?:e?s)?|digits? \d|letters? [a-z])"
_WORDS = rf"(?:(?:{'|'.join(SIZE_ORDER)}) )?(?:(?:{'|'.join(COLORS)}) )?(?:(?:{'|'.join(TEXTURES)}) )?{_NOUN}"
_SLOTS = {
    "a": rf"(?:(?:the|an?) )?{_WORDS}(?: (?:{'|'.join(PLACE_PHRASES.values())}))?",
    "g": _WORDS,
    "w": "|".join(phrase for phrases in AREA_PHRASES.values() for phrase in phrases),
    "r": "|".join(phrase for phrases in RELATION_PHRASES.values() for phrase in phrases),
    "k": "color|shape|size",
}
_SLOTS |= {"b": _SLOTS["a"], "h": _SLOTS["g"]}


def _typed_in_haste(question: str) -> str:
    return question.rstrip("?.").lower().replace("colour", "color")


def _as_pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", _typed_in_haste(template))
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{slot}>{_SLOTS[slot]})" for slot in parts[1::2]]
    return re.compile("".join(parts))


TEMPLATES = {template: (form, _as_pattern(template)) for form, them in PHRASINGS.items() for template in them}
"""Form of each phrasing, and what reads it. No two forms share a phrasing."""


def read_phrase(text: str) -> dict[str, str]:
    """Turn "a small red circle on the left" or "red objects" into the attributes it states."""
    conditions = {}
    for place, phrase in PLACE_PHRASES.items():
        if text.endswith(" " + phrase):
            conditions["place"] = place
            text = text.removesuffix(" " + phrase)
            break
    words = join_glyphs(text).split()
    if words[0] in ("a", "an", "the"):
        words = words[1:]
    for word in words:
        if word in ("tiny", *SIZES):
            conditions["size"] = word
        elif word in COLORS:
            conditions["color"] = word
        elif word in TEXTURES:
            conditions["texture"] = word
        elif word in PLACES:
            conditions["place"] = word
        else:
            noun = (_NOUNS | _PLURAL_NOUNS)[word]
            if noun is not None:
                conditions["shape"] = noun
    return conditions


def join_glyphs(text: str) -> str:
    """Write "letter k" and "digits 3" as the one word that the caption vocabulary has for it."""
    return re.sub(r"\b(digits?|letters?) (\w)\b", r"\1_\2", text)


def matching(conditions: dict[str, str], objects: Sequence[SceneObject]) -> list[SceneObject]:
    return [item for item in objects if all(getattr(item, name) == value for name, value in conditions.items())]


def related(relation: str, a: SceneObject, b: SceneObject) -> bool:
    return _RELATIONS[relation](a, b)


def caption_holds(text: str, objects: Sequence[SceneObject]) -> bool:
    """Tell exactly whether a caption in the words of `scenes.captions` is true of a scene."""
    text = join_glyphs(text)
    for relation in _RELATIONS:
        if f" {relation} " in text:
            first, second = (matching(read_phrase(part), objects) for part in text.split(f" {relation} "))
            return any(related(relation, a, b) for a in first for b in second if a is not b)
    stated = re.match(r"(\d) ", text)
    if stated:
        words = text[2:].split()
        is_list = words[0] in ("object", "objects") and len(words) > 1
        if not is_list:
            return len(matching(read_phrase(" ".join(words)), objects)) == int(stated[1])
        if int(stated[1]) != len(objects):
            return False
        text = " ".join(words[1:])
    phrases = [read_phrase(part) for part in split_phrases(text)]
    return any(
        all(item in matching(phrase, [item]) for phrase, item in zip(phrases, chosen, strict=True))
        for chosen in permutations(objects, len(phrases))
    )


def split_phrases(text: str) -> list[str]:
    """Cut "red circle top small letter_k" into its phrases: each has one noun, a place may follow it."""
    phrases: list[list[str]] = [[]]
    for word in text.split():
        has_noun = any(seen in _NOUNS for seen in phrases[-1])
        if has_noun and word not in PLACES:
            phrases.append([])
        phrases[-1].append(word)
    return [" ".join(phrase) for phrase in phrases]


def read_question(kind: str, question: str) -> list[tuple[str, str, dict[str, str]]]:
    """Every way to understand a question of a type: template, form and what fills its slots."""
    found = []
    for template, (form, pattern) in TEMPLATES.items():
        match = pattern.fullmatch(_typed_in_haste(question))
        if match and form.split("_")[0] == kind:
            found.append((template, form, match.groupdict()))
    return found


def right_answer(form: str, parts: dict[str, str], objects: Sequence[SceneObject]) -> str:
    """Answer a question other than for a description from its words, independently of how it was made."""
    if form in ("color", "shape", "size"):
        return getattr(_the(parts["a"], objects), form)
    if form == "position":
        return _the(parts["a"], objects).place
    if form == "position_area":
        return _yes(_within(parts["w"], [_the(parts["a"], objects)]) == 1)
    if form == "position_horizontal":
        return "left" if _within("in the left half", [_the(parts["a"], objects)]) else "right"
    if form == "position_vertical":
        return "top" if _within("in the top half", [_the(parts["a"], objects)]) else "bottom"
    if form.startswith(("count", "existence")):
        found = matching(read_phrase(parts["g"] if parts.get("g") else parts["a"]), objects)
        number = _within(parts["w"], found) if form.endswith("area") else len(found)
        return str(number) if form.startswith("count") else _yes(number > 0)
    if form in ("comparison_more", "comparison_equal", "comparison_which_more"):
        first, second = (len(matching(read_phrase(parts[slot]), objects)) for slot in "gh")
        assert first or second
        if form == "comparison_more":
            return _yes(first > second)
        if form == "comparison_equal":
            return _yes(first == second)
        assert first != second, "neither is more"
        return parts["g"] if first > second else parts["h"]
    if form == "comparison_all_same":
        group = matching(read_phrase(parts["g"]), objects)
        assert len(group) > 1
        return _yes(len({getattr(item, parts["k"]) for item in group}) == 1)
    a, b = _the(parts["a"], objects), _the(parts["b"], objects)
    assert a is not b
    if form == "relation":
        (relation,) = (name for name, phrases in RELATION_PHRASES.items() if parts["r"] in phrases)
        assert related(relation, a, b) != related(_OPPOSITES[relation], a, b), "neither holds"
        return _yes(related(relation, a, b))
    if form == "relation_horizontal":
        assert a.x != b.x
        return "left" if a.x < b.x else "right"
    if form == "relation_vertical":
        assert a.y != b.y
        return "above" if a.y < b.y else "below"
    if form == "comparison_same":
        return _yes(getattr(a, parts["k"]) == getattr(b, parts["k"]))
    assert form in ("comparison_larger", "comparison_which_larger")
    difference = SIZE_ORDER.index(a.size) - SIZE_ORDER.index(b.size)
    assert difference, "neither is larger"
    if form == "comparison_larger":
        return _yes(difference > 0)
    return parts["a" if difference > 0 else "b"].removeprefix("the ")


def description_holds(form: str, text: str, objects: Sequence[SceneObject]) -> bool:
    """Tell whether a description names exactly the objects, from top left to bottom right."""
    names = ("color", "shape") if form == "description_short" else ("size", "color", "texture", "shape", "place")
    phrases = re.split(r", | and (?=an? )", text)
    said = [read_phrase(phrase) for phrase in phrases]
    places = [PLACES.index(item["place"]) for item in said if "place" in item]
    are_in_order = form == "description_short" or (len(places) == len(objects) and places == sorted(places))
    expected = [{name: getattr(item, name) for name in names if getattr(item, name) is not None} for item in objects]
    return are_in_order and _as_counter(said) == _as_counter(expected)


def read_scene(text: str) -> list[SceneObject]:
    """Turn the text that stands in for an image back into objects, each in the middle of its place."""
    told = text.removeprefix("Objects: ").removesuffix(".").split("; ")
    objects = []
    for slot, words in enumerate(phrase for phrase in told if " in front of " not in phrase):
        *rest, row, column = words.split()
        x = {"left": 1, "center": 3, "right": 5}[column] * UNIT // 6
        y = {"top": 1, "middle": 3, "bottom": 5}[row] * UNIT // 6
        place = "-".join(word for word in (row, column) if word not in ("middle", "center")) or "center"
        attributes = {"texture": None, **read_phrase(" ".join(rest))}
        objects.append(SceneObject(**attributes, place=place, x=x, y=y, slot=slot))
    words = [phrase for phrase in told if " in front of " not in phrase]
    for phrase in told:
        if " in front of " in phrase:
            front, back = phrase.split(" in front of ")
            hidden = {slot for slot, item in enumerate(words) if item == back}
            objects = [
                item._replace(hides=item.hides | hidden) if words[item.slot] == front else item for item in objects
            ]
    return objects


_OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
}


def _the(phrase: str, objects: Sequence[SceneObject]) -> SceneObject:
    """The one object that a definite phrase means."""
    found = matching(read_phrase(phrase), objects)
    assert len(found) == 1, f"'{phrase}' is ambiguous"
    return found[0]


def _within(phrase: str, objects: Sequence[SceneObject]) -> int:
    """How many of the objects lie in an area; each must be clearly inside or outside."""
    (area,) = (name for name, phrases in AREA_PHRASES.items() if phrase in phrases)
    centres = [item.x if area.startswith(("left", "right")) else item.y for item in objects]
    if area.endswith("half"):
        assert all(abs(2 * centre - UNIT) > UNIT // 3 for centre in centres), "near the middle"
    return sum(map(_AREAS[area], objects))


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"


def _as_counter(phrases: Sequence[dict[str, str]]) -> Counter[tuple[tuple[str, str], ...]]:
    return Counter(tuple(sorted(phrase.items())) for phrase in phrases)
