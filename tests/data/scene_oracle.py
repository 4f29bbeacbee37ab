"""An independent reader of scene phrases and captions, to check what the package writes."""

import re
from collections.abc import Sequence
from itertools import permutations

from sf_mllm.data.scene_domains import COLORS, GLYPHS, PLACES, SHAPES, SIZES, TEXTURES
from sf_mllm.data.scene_language import PLACE_PHRASES, SceneObject

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
    """Tell exactly whether a caption in the words of `scene_captions` is true of a scene."""
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
