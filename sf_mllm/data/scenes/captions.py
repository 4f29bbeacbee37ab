"""Captions of scenes as tensors: made, checked against scenes and turned into tokens on the scenes' own device.

A caption is a structure (phrases with attributes, a relation, a number) before it is words. So it can be edited into a
wrong one, and its truth about any scene can be computed, which tells real negatives from accidental matches.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.scenes.domains import DOMAINS, MAX_OBJECTS, UNIT
from sf_mllm.data.scenes.draws import Draws, constant
from sf_mllm.data.scenes.overlap import CLEARLY_HIDDEN
from sf_mllm.data.scenes.sampling import RELATION_MARGIN, Scenes, choose

LIST, RELATION, COUNT = range(3)
"""Kinds of captions: "2 objects red circle top small blue star left", "red circle left of star", "3 red objects"."""
ANY = -1
"""An attribute that a phrase leaves open, or a number that a caption does not state."""
# How often captions of a kind state each attribute.
_LIST_SHARES = {"size": 0.4, "color": 0.7, "shape": 0.7, "place": 0.5, "texture": 0.4}
_PHRASE_SHARES = {"size": 0.25, "color": 0.85, "shape": 0.85, "place": 0.6, "texture": 0.3}
_RELATION_SIZE_SHARE = _RELATION_TEXTURE_SHARE = _COUNT_TEXTURE_SHARE = 0.3
_OVERLAP_SHARE = 0.4  # of the relations, where objects overlap


@dataclass
class Captions:
    """A batch of captions; unused phrases hold ANY throughout."""

    kind: Tensor  # [B] LIST, RELATION or COUNT
    phrase: Tensor  # [B, 8, A] value of each of the domain's attributes in each phrase, or ANY
    used: Tensor  # [B, 8] phrases that the caption has; RELATION uses the first two, COUNT the first
    number: Tensor  # [B] LIST: objects in the scene, COUNT: objects that fit phrase 0; ANY is unstated
    # [B] index into `scene_language.RELATIONS`; read by RELATION only
    relation: Tensor
    domain: str = "plain"

    def __len__(self) -> int:
        return len(self.kind)


def full_captions(scenes: Scenes, states_number: Tensor) -> Captions:
    """Name every object with all attributes (without sizes where they would not fit the context).

    Args:
        scenes: B scenes.
        states_number: [B] bool, whether the caption starts with the number of objects.
    """
    phrase = facts(scenes)
    phrase[..., 0].masked_fill_(~_has_room_for_sizes(scenes)[:, None], ANY)
    return Captions(
        domain=scenes.domain,
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
    fact = facts(scenes)
    chosen = (draws.words(1) % scenes.count[:, None])[..., None].expand(-1, -1, fact.shape[-1])
    kept = draws.uniform(fact.shape[-1]) < _shares(_PHRASE_SHARES, scenes)
    kept[:, 1] |= ~kept[:, 2]
    phrase = torch.full_like(fact, ANY)
    phrase[:, 0] = torch.where(kept, fact.gather(1, chosen)[:, 0], ANY)
    return _captions_of(scenes, LIST, phrase, _first(1, scenes))


def all_phrases(device: str | torch.device, domain: str = "plain") -> Captions:
    """Make the captions of one object that state its colour and shape, alone or with one thing more.

    That is its place and, in cluttered scenes, its texture or its size; plain scenes teach sizes without being asked.
    All kinds of phrases would not do: an image feature has room for so many facts, and gives it to those that are asked
    for.

    Returns:
        640 captions of plain scenes, 6336 of cluttered ones. Those that state the same attributes stand together, see
        `count_families`.
    """
    attributes, is_cluttered = DOMAINS[domain].attributes, DOMAINS[domain].is_cluttered
    columns = [torch.arange(ANY, len(values), device=device) for values in attributes.values()]
    stated = torch.cartesian_prod(*columns)  # [P, A]
    is_named = {name: stated[:, column] != ANY for column, name in enumerate(attributes)}
    others = sum(is_named[name].long() for name in attributes if name not in ("color", "shape"))
    names_size = is_named["size"] & (not is_cluttered)
    stated = stated[is_named["color"] & is_named["shape"] & ~names_size & (others <= 1)]
    stated = stated[_family(stated).argsort(stable=True)]
    zeros = torch.zeros(len(stated), dtype=torch.int64, device=device)
    phrase = F.pad(stated[:, None], (0, 0, 0, MAX_OBJECTS - 1), value=ANY)  # [P, 8, A]
    used = torch.arange(MAX_OBJECTS, device=device).expand(len(stated), -1) < 1
    return Captions(zeros + LIST, phrase, used, number=zeros + ANY, relation=zeros, domain=domain)


def count_families(phrases: Captions) -> list[int]:
    """Return how many of `all_phrases` state the same attributes, in their order."""
    return torch.unique_consecutive(_family(phrases.phrase[:, 0]), return_counts=True)[1].tolist()


def phrases_hold(phrases: Captions, scenes: Scenes) -> Tensor:
    """Tell which captions of one object are true of which scenes: what `may_hold` says, at an eighth of its work.

    Args:
        phrases: T captions, from `all_phrases` or `phrase_captions`.
        scenes: B scenes.

    Returns:
        [T, B] bool.
    """
    fact = facts(scenes)
    fits = scenes.present[None]
    for column in range(fact.shape[-1]):
        stated = phrases.phrase[:, 0, column, None, None]
        fits = fits & ((stated == fact[None, :, :, column]) | (stated == ANY))
    return fits.any(dim=-1)


def relation_captions(scenes: Scenes, draws: Draws) -> Captions:
    """Relate two objects that are clearly apart or clearly overlap; a scene without such a pair gets one object."""
    phrases = phrase_captions(scenes, draws)
    relations, is_possible = _relation_captions(scenes, draws)
    return choose(is_possible, relations, phrases)


def count_captions(scenes: Scenes, draws: Draws) -> Captions:
    """Count all objects, or those with the colour, shape and/or texture of one of them."""
    fact = facts(scenes)
    example = (draws.words(1) % scenes.count[:, None])[..., None].expand(-1, -1, fact.shape[-1])
    example_facts = fact.gather(1, example)[:, 0]  # [B, A]
    condition = draws.uniform(1)  # none .3, colour .25, shape .25, both .2
    none = torch.zeros_like(condition) > 0
    kept = [none, (condition >= 0.3) & ((condition < 0.55) | (condition >= 0.8)), condition >= 0.55, none]
    if _has_textures(scenes):
        kept.append(draws.uniform(1) < _COUNT_TEXTURE_SHARE)
    phrase = torch.full_like(fact, ANY)
    phrase[:, 0] = torch.where(torch.cat(kept, dim=1), example_facts, ANY)
    fits = ((phrase[:, :1] == fact) | (phrase[:, :1] == ANY)).all(dim=-1) & scenes.present
    return _captions_of(scenes, COUNT, phrase, _first(1, scenes), number=fits.sum(dim=1))


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
    phrase, fact = captions.phrase, facts(scenes)  # [T, 8, A], [B, 8, A]
    kind, used, number, relation = captions.kind, captions.used, captions.number, captions.relation
    identical = (phrase[:, :, None] == phrase[:, None]).all(dim=-1) & used[:, None]  # [T, 8, 8]
    needed = identical.sum(dim=-1)  # objects that each phrase asks for
    if all_pairs:
        phrase, used, needed = phrase[:, None], used[:, None], needed[:, None]
        kind, number, relation = kind[:, None], number[:, None], relation[:, None]

    fits = scenes.present[:, None, :]  # [.., phrases, objects]
    for column in range(fact.shape[-1]):
        stated = phrase[..., column, None]
        fits = fits & ((stated == fact[:, None, :, column]) | (stated == ANY))
    fitting = fits.sum(dim=-1)  # [.., 8]
    list_holds = (~used | (fitting >= needed)).all(dim=-1) & ((number == ANY) | (number == scenes.count))

    is_left = scenes.x[:, :, None] < scenes.x[:, None]  # [B, 8, 8], first object left of second
    is_above = scenes.y[:, :, None] < scenes.y[:, None]
    pairs = [is_left, is_left.transpose(1, 2), is_above, is_above.transpose(1, 2)]
    if _may_overlap(scenes):
        is_in_front = scenes.hidden > 0
        pairs += [is_in_front, is_in_front.transpose(1, 2)]
    relation_holds = torch.zeros_like(list_holds)
    for index, holds in enumerate(pairs):
        pair_exists = (fits[..., 0, :, None] & fits[..., 1, None, :] & holds).flatten(-2).any(dim=-1)
        relation_holds = relation_holds | (pair_exists & (relation == index))
    count_holds = fitting[..., 0] == number
    return torch.where(kind == LIST, list_holds, torch.where(kind == RELATION, relation_holds, count_holds))


def facts(scenes: Scenes) -> Tensor:
    """Return the attributes of each object that captions name: [B, 8, A], ANY in empty slots."""
    return torch.stack([getattr(scenes, name) for name in DOMAINS[scenes.domain].attributes], dim=-1)


def _partial_captions(scenes: Scenes, draws: Draws) -> Captions:
    """List some of the objects, some of their attributes; no number."""
    forced = torch.arange(MAX_OBJECTS, device=draws.device) == draws.words(1) % scenes.count[:, None]
    used = scenes.present & (forced | (draws.uniform(MAX_OBJECTS) < 0.6))
    fact = facts(scenes)
    kept = draws.uniform(fact[0].numel()).view_as(fact) < _shares(_LIST_SHARES, scenes)
    kept[..., 1] |= ~kept.any(dim=-1)
    kept[..., 0] &= _has_room_for_sizes(scenes)[:, None]
    # A phrase left without any attribute (only its size was kept, and dropped for room) is "object".
    return _captions_of(scenes, LIST, torch.where(kept & used[..., None], fact, ANY), used)


def _relation_captions(scenes: Scenes, draws: Draws) -> tuple[Captions, Tensor]:
    """Relate two objects that are clearly apart or overlap; also return which scenes have such a pair [B]."""
    centre = torch.stack((scenes.x, scenes.y), dim=1)  # [B, 2, 8]
    delta = centre[:, :, None, :] - centre[:, :, :, None]  # [B, axis, first, second], second minus first
    cell = 3 * centre // UNIT
    is_clear = (delta.abs() >= RELATION_MARGIN) & (cell[:, :, None, :] != cell[:, :, :, None])
    is_clear = is_clear & (scenes.present[:, :, None] & scenes.present[:, None])[:, None]
    if _may_overlap(scenes):
        is_in_front = scenes.hidden >= CLEARLY_HIDDEN
        overlaps = is_in_front | is_in_front.transpose(1, 2)
        gives_way = overlaps.flatten(1).any(dim=1) & (draws.uniform(1)[:, 0] < _OVERLAP_SHARE)
        is_clear = torch.cat((is_clear & ~gives_way[:, None, None, None], overlaps[:, None]), dim=1)
        delta = torch.cat((delta, is_in_front[:, None].long()), dim=1)
    score = draws.uniform(delta[0].numel()).view_as(delta)
    best = score.masked_fill(~is_clear, -1).flatten(1).argmax(dim=1)
    axis, pair = best // MAX_OBJECTS**2, best % MAX_OBJECTS**2
    # The second lies right of, below or behind the first.
    is_after = delta.flatten(1).gather(1, best[:, None])[:, 0] > 0

    stated = draws.uniform(2)  # colour and shape, shape only, colour only
    names_size, none = draws.uniform(2) < _RELATION_SIZE_SHARE, torch.zeros_like(stated) > 0
    kept = [names_size, stated < 0.8, (stated < 0.6) | (stated >= 0.8), none]
    if _has_textures(scenes):
        kept.append(draws.uniform(2) < _RELATION_TEXTURE_SHARE)
    objects = torch.stack((pair // MAX_OBJECTS, pair % MAX_OBJECTS), dim=1)  # [B, 2]
    fact = facts(scenes)
    named = fact.gather(1, objects[..., None].expand(-1, -1, fact.shape[-1]))
    phrase = torch.full_like(fact, ANY)
    phrase[:, :2] = torch.where(torch.stack(kept, dim=-1), named, ANY)
    captions = _captions_of(scenes, RELATION, phrase, _first(2, scenes))
    return dataclasses.replace(captions, relation=2 * axis + is_after.logical_not()), is_clear.flatten(1).any(dim=1)


def _captions_of(scenes: Scenes, kind: int, phrase: Tensor, used: Tensor, number: Tensor | None = None) -> Captions:
    """Put captions together that state no relation; without a number, none is stated."""
    zeros = torch.zeros_like(scenes.count)
    number = zeros + ANY if number is None else number
    return Captions(zeros + kind, phrase, used, number, relation=zeros, domain=scenes.domain)


def _shares(shares: dict[str, float], scenes: Scenes) -> Tensor:
    """[A], the shares of the attributes that the domain names."""
    return constant(tuple(shares[name] for name in DOMAINS[scenes.domain].attributes), scenes.count.device)


def _has_room_for_sizes(scenes: Scenes) -> Tensor:
    """[B], whether all objects fit the context with all attributes, besides <bos>, <eos>, number and noun."""
    domain = DOMAINS[scenes.domain]
    return scenes.count <= (domain.context_length - 4) // len(domain.attributes)


def _has_textures(scenes: Scenes) -> bool:
    return "texture" in DOMAINS[scenes.domain].attributes


def _may_overlap(scenes: Scenes) -> bool:
    return DOMAINS[scenes.domain].is_cluttered


def _family(stated: Tensor) -> Tensor:
    """Number [P] for which of the attributes [P, A] are stated."""
    return ((stated != ANY) << torch.arange(stated.shape[-1], device=stated.device)).sum(dim=-1)


def _first(number: int, scenes: Scenes) -> Tensor:
    """[B, 8], true for the first phrases."""
    return (torch.arange(MAX_OBJECTS, device=scenes.count.device) < number).expand(len(scenes), -1)
