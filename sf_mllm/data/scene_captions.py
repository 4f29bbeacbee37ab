"""Captions of scenes as tensors: made, checked against scenes and turned into tokens on the scenes' own device.

A caption is a structure (phrases with attributes, a relation, a number) before it is words. So it can be edited into a
wrong one, and its truth about any scene can be computed, which tells real negatives from accidental matches.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.scene_sampling import (
    COLORS,
    MAX_OBJECTS,
    PLACES,
    RELATION_MARGIN,
    SHAPES,
    SIZES,
    UNIT,
    Draws,
    Scenes,
    constant,
)

LIST, RELATION, COUNT = range(3)
"""Kinds of captions: "2 objects red circle top small blue star left", "red circle left of star", "3 red objects"."""
ANY = -1
"""An attribute that a phrase leaves open, or a number that a caption does not state."""
ATTRIBUTE_VALUES = (len(SIZES), len(COLORS), len(SHAPES), len(PLACES))
"""Number of values of each attribute column of a phrase: size, colour, shape, place."""

PAD, BOS, EOS, UNKNOWN = range(4)
_PLURALS = tuple(shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES)
_NUMBERS = tuple(str(number) for number in range(MAX_OBJECTS + 1))
WORDS = (
    *("<pad>", "<bos>", "<eos>", "<unk>"),
    *(*SIZES, *COLORS, *SHAPES, *PLACES, *_PLURALS, *_NUMBERS),
    *("object", "objects", "of", "above", "below"),
)
"""The caption vocabulary; the token of a word is its index."""
CONTEXT_LENGTH = 32
"""Tokens of a caption with <bos> and <eos>: the longest has 30 words."""
SHORT_LENGTH = 10
"""The same for relations and counts: the longest relates two objects, named with size, colour and shape."""
PHRASE_LENGTH = 6
"""The same for captions of one object."""

_SIZE0, _COLOR0, _SHAPE0, _PLACE0 = (WORDS.index(names[0]) for names in (SIZES, COLORS, SHAPES, PLACES))
_PLURAL0, _NUMBER0 = WORDS.index(_PLURALS[0]), WORDS.index(_NUMBERS[0])
_OBJECT, _OBJECTS, _OF = WORDS.index("object"), WORDS.index("objects"), WORDS.index("of")
_RELATION_WORDS = tuple(WORDS.index(word) for word in ("left", "right", "above", "below"))
_MAX_SIZED_OBJECTS = 7  # eight objects with their sizes would not fit the context


@dataclass
class Captions:
    """A batch of captions; unused phrases hold ANY throughout."""

    kind: Tensor  # [B] LIST, RELATION or COUNT
    phrase: Tensor  # [B, 8, 4] size, colour, shape, place of each phrase, or ANY
    used: Tensor  # [B, 8] phrases that the caption has; RELATION uses the first two, COUNT the first
    number: Tensor  # [B] LIST: objects in the scene, COUNT: objects that fit phrase 0; ANY is unstated
    relation: Tensor  # [B] 0 left of, 1 right of, 2 above, 3 below; read by RELATION only

    def __len__(self) -> int:
        return len(self.kind)


def choose(condition: Tensor, first: Captions, second: Captions) -> Captions:
    """Take the captions of `first` where the condition [B] holds, else those of `second`."""
    chosen = {}
    for field in dataclasses.fields(Captions):
        a, b = getattr(first, field.name), getattr(second, field.name)
        chosen[field.name] = torch.where(condition.view(-1, *(1,) * (a.dim() - 1)), a, b)
    return Captions(**chosen)


def full_captions(scenes: Scenes, states_number: Tensor) -> Captions:
    """Name every object with all attributes (eight objects without their sizes).

    Args:
        scenes: B scenes.
        states_number: [B] bool, whether the caption starts with the number of objects.
    """
    phrase = facts(scenes)
    phrase[..., 0].masked_fill_((scenes.count > _MAX_SIZED_OBJECTS)[:, None], ANY)
    return Captions(
        kind=torch.full_like(scenes.count, LIST),
        phrase=phrase,
        used=scenes.present,
        number=torch.where(states_number, scenes.count, ANY),
        relation=torch.zeros_like(scenes.count),
    )


def list_captions(scenes: Scenes, draws: Draws) -> Captions:
    """Name objects: half of the captions all of them with all attributes, half some of them with some attributes.

    Like `phrase_captions`, `relation_captions` and `count_captions` the structure depends on `draws` alone as far as
    possible: an edited copy of a scene gets the same caption but for the edit.
    """
    is_full, states_number = draws.uniform(2).unbind(dim=1)
    return choose(is_full < 0.5, full_captions(scenes, states_number < 0.5), _partial_captions(scenes, draws))


def phrase_captions(scenes: Scenes, draws: Draws) -> Captions:
    """Name one object by colour and/or shape, often with its place, at times with its size."""
    chosen = (draws.words(1) % scenes.count[:, None])[..., None].expand(-1, -1, 4)
    kept = draws.uniform(4) < constant((0.25, 0.85, 0.85, 0.6), draws.device)
    kept[:, 1] |= ~kept[:, 2]
    phrase = torch.full_like(facts(scenes), ANY)
    phrase[:, 0] = torch.where(kept, facts(scenes).gather(1, chosen)[:, 0], ANY)
    zeros = torch.zeros_like(scenes.count)
    return Captions(kind=zeros + LIST, phrase=phrase, used=_first(1, scenes), number=zeros + ANY, relation=zeros)


def all_phrases(device: str | torch.device) -> Captions:
    """Make every caption of one object, with every combination of stated and open attributes.

    Returns:
        3239 captions; the one that states nothing is left out.
    """
    columns = [torch.arange(ANY, values, device=device) for values in ATTRIBUTE_VALUES]
    stated = torch.cartesian_prod(*columns)[1:]  # [P, 4]; the first has ANY throughout
    zeros = torch.zeros(len(stated), dtype=torch.int64, device=device)
    phrase = F.pad(stated[:, None], (0, 0, 0, MAX_OBJECTS - 1), value=ANY)  # [P, 8, 4]
    used = torch.arange(MAX_OBJECTS, device=device).expand(len(stated), -1) < 1
    return Captions(kind=zeros + LIST, phrase=phrase, used=used, number=zeros + ANY, relation=zeros)


def phrases_hold(phrases: Captions, scenes: Scenes) -> Tensor:
    """Tell which captions of one object are true of which scenes: what `may_hold` says, at an eighth of its work.

    Args:
        phrases: T captions, from `all_phrases` or `phrase_captions`.
        scenes: B scenes.

    Returns:
        [T, B] bool.
    """
    fact = facts(scenes)
    fits = scenes.present[None]  # [T, B, 8]
    for column in range(len(ATTRIBUTE_VALUES)):
        stated = phrases.phrase[:, 0, column, None, None]
        fits = fits & ((stated == fact[None, :, :, column]) | (stated == ANY))
    return fits.any(dim=-1)


def relation_captions(scenes: Scenes, draws: Draws) -> Captions:
    """Relate two objects that are clearly apart; a scene without such a pair gets a caption of one object."""
    phrases = phrase_captions(scenes, draws)
    relations, is_possible = _relation_captions(scenes, draws)
    return choose(is_possible, relations, phrases)


def count_captions(scenes: Scenes, draws: Draws) -> Captions:
    """Count all objects, or those with the colour and/or shape of one of them."""
    example = (draws.words(1) % scenes.count[:, None])[..., None].expand(-1, -1, 4)
    example_facts = facts(scenes).gather(1, example)[:, 0]  # [B, 4]
    condition = draws.uniform(1)  # none .3, colour .25, shape .25, both .2
    none = torch.zeros_like(condition) > 0
    kept = torch.cat(
        (none, (condition >= 0.3) & ((condition < 0.55) | (condition >= 0.8)), condition >= 0.55, none), dim=1
    )
    phrase = torch.full_like(facts(scenes), ANY)
    phrase[:, 0] = torch.where(kept, example_facts, ANY)
    fits = ((phrase[:, :1] == facts(scenes)) | (phrase[:, :1] == ANY)).all(dim=-1) & scenes.present
    zeros = torch.zeros_like(scenes.count)
    number = fits.sum(dim=1)
    return Captions(kind=zeros + COUNT, phrase=phrase, used=_first(1, scenes), number=number, relation=zeros)


def wrong_captions(captions: Captions, draws: Draws) -> Captions:
    """Edit each caption in one place: swap or replace an attribute, turn a relation round, change a number.

    The result may by chance still be true of the scene: check with `may_hold`.
    """
    edit = draws.uniform(1)[:, 0]
    swapped, can_swap = _swap_attributes(captions, draws)
    replaced, can_replace = _replace_attribute(captions, draws)
    step = torch.where(draws.uniform(1)[:, 0] < 0.5, 1, -1)
    number = captions.number + step
    number = torch.where((number < 1) | (number > MAX_OBJECTS), captions.number - step, number)
    renumbered = dataclasses.replace(captions, number=torch.where(captions.number == ANY, ANY, number))
    turned = dataclasses.replace(captions, relation=captions.relation ^ 1)

    is_relation, has_number = captions.kind == RELATION, captions.number != ANY
    result = choose(can_swap & (edit < 0.6), swapped, choose(can_replace, replaced, renumbered))
    result = choose(is_relation & (edit >= 0.6), turned, result)
    return choose(has_number & (edit >= torch.where(captions.kind == COUNT, 0.4, 0.85)), renumbered, result)


def may_hold(captions: Captions, scenes: Scenes, *, all_pairs: bool = False) -> Tensor:
    """Tell whether captions are, or may pass as, true of scenes.

    Exact for relations and counts. A list counts as true when each of its phrases alone fits enough objects, which is
    right except for rare lists whose open phrases compete for the same object; those are called true.

    Args:
        captions: T captions.
        scenes: B scenes; T = B unless `all_pairs`.
        all_pairs: compare every caption with every scene.

    Returns:
        [B] bool, or [T, B] with `all_pairs`.
    """
    phrase, fact = captions.phrase, facts(scenes)  # [T, 8, 4], [B, 8, 4]
    kind, used, number, relation = captions.kind, captions.used, captions.number, captions.relation
    identical = (phrase[:, :, None] == phrase[:, None]).all(dim=-1) & used[:, None]  # [T, 8, 8]
    needed = identical.sum(dim=-1)  # objects that each phrase asks for
    if all_pairs:
        phrase, used, needed = phrase[:, None], used[:, None], needed[:, None]
        kind, number, relation = kind[:, None], number[:, None], relation[:, None]

    fits = scenes.present[:, None, :]  # [.., phrases, objects]
    for column in range(len(ATTRIBUTE_VALUES)):
        stated = phrase[..., column, None]
        fits = fits & ((stated == fact[:, None, :, column]) | (stated == ANY))
    fitting = fits.sum(dim=-1)  # [.., 8]
    list_holds = (~used | (fitting >= needed)).all(dim=-1) & ((number == ANY) | (number == scenes.count))

    is_left = scenes.x[:, :, None] < scenes.x[:, None]  # [B, 8, 8], first object left of second
    is_above = scenes.y[:, :, None] < scenes.y[:, None]
    relation_holds = torch.zeros_like(list_holds)
    for index, holds in enumerate((is_left, is_left.transpose(1, 2), is_above, is_above.transpose(1, 2))):
        pair_exists = (fits[..., 0, :, None] & fits[..., 1, None, :] & holds).flatten(-2).any(dim=-1)
        relation_holds = relation_holds | (pair_exists & (relation == index))
    count_holds = fitting[..., 0] == number
    return torch.where(kind == LIST, list_holds, torch.where(kind == RELATION, relation_holds, count_holds))


def tokenize(captions: Captions) -> Tensor:
    """Turn captions into tokens.

    Returns:
        [B, CONTEXT_LENGTH] int64: <bos>, words, <eos>, padding.
    """
    is_count = captions.kind == COUNT
    is_plural = captions.number != 1
    first_words = constant((_SIZE0, _COLOR0, _SHAPE0, _PLACE0), captions.kind.device)
    phrase = torch.where(captions.phrase == ANY, PAD, captions.phrase + first_words)  # [B, 8, 4]
    phrase[..., 2] = torch.where(captions.phrase[..., 2] == ANY, _OBJECT, phrase[..., 2])
    plural = torch.where(captions.phrase[:, 0, 2] == ANY, _OBJECTS, captions.phrase[:, 0, 2] + _PLURAL0)
    phrase[:, 0, 2] = torch.where(is_count & is_plural, plural, phrase[:, 0, 2])
    phrase = torch.where(captions.used[..., None], phrase, PAD)

    number = torch.where(captions.number == ANY, PAD, captions.number + _NUMBER0)
    noun = torch.where(is_plural, _OBJECTS, _OBJECT)
    noun = torch.where((captions.number == ANY) | is_count, PAD, noun)
    relation = constant(_RELATION_WORDS, captions.kind.device)[captions.relation]
    relation = torch.stack((relation, torch.where(captions.relation < 2, _OF, PAD)), dim=1)  # "left of", "above"
    relation = torch.where((captions.kind == RELATION)[:, None], relation, PAD)

    bos = torch.full_like(number, BOS)
    words = torch.cat(
        (torch.stack((bos, number, noun), dim=1), phrase[:, 0], relation, phrase[:, 1:].flatten(1)), dim=1
    )  # [B, 3 + 4 + 2 + 28], with gaps
    words = torch.cat((words, torch.full_like(words[:, :1], EOS)), dim=1)
    order = (words == PAD).to(torch.int8).argsort(dim=1, stable=True)  # words to the front, in their order
    return words.gather(1, order)[:, :CONTEXT_LENGTH]


def facts(scenes: Scenes) -> Tensor:
    """Return size, colour, shape and place of each object: [B, 8, 4], ANY in empty slots."""
    return torch.stack((scenes.size, scenes.color, scenes.shape, scenes.place), dim=-1)


def _partial_captions(scenes: Scenes, draws: Draws) -> Captions:
    """List some of the objects, some of their attributes; no number."""
    forced = torch.arange(MAX_OBJECTS, device=draws.device) == draws.words(1) % scenes.count[:, None]
    used = scenes.present & (forced | (draws.uniform(MAX_OBJECTS) < 0.6))
    kept = draws.uniform(MAX_OBJECTS * 4).view(-1, MAX_OBJECTS, 4) < constant((0.4, 0.7, 0.7, 0.5), draws.device)
    kept[..., 1] |= ~kept.any(dim=-1)
    kept[..., 0] &= (scenes.count <= _MAX_SIZED_OBJECTS)[:, None]
    phrase = torch.where(kept & used[..., None], facts(scenes), ANY)
    # A phrase left without any attribute (only its size was kept, and dropped for room) is "object".
    zeros = torch.zeros_like(scenes.count)
    return Captions(kind=zeros + LIST, phrase=phrase, used=used, number=zeros + ANY, relation=zeros)


def _relation_captions(scenes: Scenes, draws: Draws) -> tuple[Captions, Tensor]:
    """Relate two objects that are clearly apart; also return which scenes have such a pair [B]."""
    centre = torch.stack((scenes.x, scenes.y), dim=1)  # [B, 2, 8]
    delta = centre[:, :, None, :] - centre[:, :, :, None]  # [B, axis, first, second], second minus first
    cell = 3 * centre // UNIT
    is_clear = (delta.abs() >= RELATION_MARGIN) & (cell[:, :, None, :] != cell[:, :, :, None])
    is_clear = is_clear & (scenes.present[:, :, None] & scenes.present[:, None])[:, None]
    score = draws.uniform(2 * MAX_OBJECTS**2).view_as(delta)
    best = score.masked_fill(~is_clear, -1).flatten(1).argmax(dim=1)
    axis, pair = best // MAX_OBJECTS**2, best % MAX_OBJECTS**2
    is_after = delta.flatten(1).gather(1, best[:, None])[:, 0] > 0  # the second lies right of or below the first

    stated = draws.uniform(2)  # colour and shape, shape only, colour only
    kept = torch.stack(
        (draws.uniform(2) < 0.3, stated < 0.8, (stated < 0.6) | (stated >= 0.8), torch.zeros_like(stated) > 0), dim=-1
    )
    objects = torch.stack((pair // MAX_OBJECTS, pair % MAX_OBJECTS), dim=1)  # [B, 2]
    named = facts(scenes).gather(1, objects[..., None].expand(-1, -1, 4))
    phrase = torch.full_like(facts(scenes), ANY)
    phrase[:, :2] = torch.where(kept, named, ANY)
    captions = Captions(
        kind=torch.full_like(scenes.count, RELATION),
        phrase=phrase,
        used=_first(2, scenes),
        number=torch.full_like(scenes.count, ANY),
        relation=2 * axis + is_after.logical_not(),
    )
    return captions, is_clear.flatten(1).any(dim=1)


def _first(number: int, scenes: Scenes) -> Tensor:
    """[B, 8], true for the first phrases."""
    return (torch.arange(MAX_OBJECTS, device=scenes.count.device) < number).expand(len(scenes), -1)


def _swap_attributes(captions: Captions, draws: Draws) -> tuple[Captions, Tensor]:
    """Exchange one attribute between two phrases that differ in it; also return where that was possible [B]."""
    phrase = captions.phrase
    first, second = phrase[:, :, None], phrase[:, None]  # [B, 8, 1, 4], [B, 1, 8, 4]
    both_used = (captions.used[:, :, None] & captions.used[:, None])[..., None]
    is_possible = both_used & (first != ANY) & (second != ANY) & (first != second)  # [B, 8, 8, 4]
    score = draws.uniform(MAX_OBJECTS**2 * 4).view_as(is_possible).masked_fill(~is_possible, -1)
    best = score.flatten(1).argmax(dim=1, keepdim=True)
    column = best % 4
    one, two = (best // 4 // MAX_OBJECTS) * 4 + column, (best // 4 % MAX_OBJECTS) * 4 + column  # into 8 * 4
    flat = phrase.flatten(1)
    swapped = flat.scatter(1, one, flat.gather(1, two)).scatter(1, two, flat.gather(1, one))
    return dataclasses.replace(captions, phrase=swapped.view_as(phrase)), is_possible.flatten(1).any(dim=1)


def _replace_attribute(captions: Captions, draws: Draws) -> tuple[Captions, Tensor]:
    """Give one stated attribute another value; also return where a caption states any [B]."""
    flat = captions.phrase.flatten(1)  # [B, 32]
    is_stated = flat != ANY
    best = draws.uniform(MAX_OBJECTS * 4).masked_fill(~is_stated, -1).argmax(dim=1, keepdim=True)
    values = constant(ATTRIBUTE_VALUES, draws.device)[best % 4]
    other = (flat.gather(1, best) + 1 + ((draws.words(1) * (values - 1)) >> 32)) % values
    replaced = flat.scatter(1, best, other).view_as(captions.phrase)
    return dataclasses.replace(captions, phrase=replaced), is_stated.any(dim=1)
