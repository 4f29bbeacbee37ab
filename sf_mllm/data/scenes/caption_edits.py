"""Wrong versions of captions: one edit each."""

import dataclasses

import torch
from torch import Tensor

from sf_mllm.data.scenes.captions import ANY, COUNT, RELATION, Captions
from sf_mllm.data.scenes.domains import DOMAINS, MAX_OBJECTS
from sf_mllm.data.scenes.draws import Draws, constant
from sf_mllm.data.scenes.sampling import choose, other_shape


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


def _swap_attributes(captions: Captions, draws: Draws) -> tuple[Captions, Tensor]:
    """Exchange one attribute between two phrases that differ in it; also return where that was possible [B]."""
    phrase = captions.phrase
    columns = phrase.shape[-1]
    first, second = phrase[:, :, None], phrase[:, None]  # [B, 8, 1, A], [B, 1, 8, A]
    both_used = (captions.used[:, :, None] & captions.used[:, None])[..., None]
    is_possible = both_used & (first != ANY) & (second != ANY) & (first != second)  # [B, 8, 8, A]
    score = draws.uniform(is_possible[0].numel()).view_as(is_possible).masked_fill(~is_possible, -1)
    best = score.flatten(1).argmax(dim=1, keepdim=True)
    column, pair = best % columns, best // columns
    one, two = (pair // MAX_OBJECTS) * columns + column, (pair % MAX_OBJECTS) * columns + column  # into 8 * A
    flat = phrase.flatten(1)
    swapped = flat.scatter(1, one, flat.gather(1, two)).scatter(1, two, flat.gather(1, one))
    return dataclasses.replace(captions, phrase=swapped.view_as(phrase)), is_possible.flatten(1).any(dim=1)


def _replace_attribute(captions: Captions, draws: Draws) -> tuple[Captions, Tensor]:
    """Give one stated attribute another value; also return where a caption states any [B].

    A glyph becomes another glyph, and a shape another shape: what is easily told apart teaches nothing.
    """
    flat = captions.phrase.flatten(1)  # [B, 8 * A]
    is_stated = flat != ANY
    best = draws.uniform(flat.shape[1]).masked_fill(~is_stated, -1).argmax(dim=1, keepdim=True)
    attributes = DOMAINS[captions.domain].attributes
    column, value = best % len(attributes), flat.gather(1, best)
    number = constant(tuple(map(len, attributes.values())), draws.device)[column]
    words = draws.words(1)
    other = (value + 1 + ((words * (number - 1)) >> 32)) % number
    other = torch.where(column == list(attributes).index("shape"), other_shape(value, words), other)
    replaced = flat.scatter(1, best, other).view_as(captions.phrase)
    return dataclasses.replace(captions, phrase=replaced), is_stated.any(dim=1)
