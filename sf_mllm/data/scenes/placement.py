"""Places for the objects of scenes: apart from each other or, in cluttered scenes, in front of a part of another."""

from typing import NamedTuple

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import MAX_OBJECTS, SHAPES, UNIT, Domain
from sf_mllm.data.scenes.draws import Draws, constant
from sf_mllm.data.scenes.overlap import CLEARLY_HIDDEN, Outline, cosines, hidden_share, most_hidden

_GAP = 41  # free space between two bounding circles
_BORDER = 20  # free space between a bounding circle and the image edge
_CELL_BAND = 61  # centres keep this far from the borders of the 3x3 cells, so that a place is never ambiguous
_CANDIDATES_PER_SIZE = 12
_PROPOSALS = 6  # places in front of another object that an object tries first
_OVERLAP_WISH = 0.6  # share of objects that want to lie in front of another one; about half of them find a place


class Placement(NamedTuple):
    """Where objects lie, all [B, 8]; only rows with `placed` mean something."""

    size: Tensor
    radius: Tensor
    x: Tensor
    y: Tensor
    placed: Tensor  # bool, the object found room


def place_objects(
    draws: Draws,
    domain: Domain,
    size: Tensor,
    jitter_percent: Tensor,
    wanted: Tensor,
    shape: Tensor,
    angle: Tensor,
    *,
    most: int,
) -> Placement:
    """Put objects one after the other where they touch no earlier one; each tries its own size, then smaller ones.

    In a cluttered domain many objects first try to hide a part of one earlier object: enough to be seen, and little
    enough to leave that object's shape in no doubt. An object is hidden by one other at most.

    Args:
        draws: source of the candidates.
        domain: of the scenes.
        size: [B, 8] sizes to begin with.
        jitter_percent: [B, 8], the radius in percent of the size's nominal radius.
        wanted: [B] number of objects.
        shape: [B, 8], decides what is hidden in a cluttered domain.
        angle: [B, 8], the same.
        most: largest number of objects that is wanted anywhere; saves the work of looking for more places.
    """
    candidates = len(domain.sizes) * _CANDIDATES_PER_SIZE
    shrink = torch.arange(candidates, device=size.device) // _CANDIDATES_PER_SIZE  # 0 0 .. 1 1 .. 2 2
    sizes = (size[:, :, None] - shrink).clamp(min=0)  # [B, 8, K]
    radii = constant(domain.radii, size.device)[sizes] * jitter_percent[:, :, None] // 100
    xs = _spread(draws.words(MAX_OBJECTS * candidates).view_as(radii), radii)
    ys = _spread(draws.words(MAX_OBJECTS * candidates).view_as(radii), radii)
    proposals = _Proposals(draws) if domain.is_cluttered else None

    blank = torch.zeros_like
    result = Placement(blank(size), blank(size), blank(size), blank(size), blank(size, dtype=torch.bool))
    is_covered = torch.zeros_like(result.placed)
    for slot in range(most):
        earlier = Placement(*(values[:, :slot] for values in result))
        x, y, radius = xs[:, slot], ys[:, slot], radii[:, slot]  # [B, K]
        choices = Placement(sizes[:, slot], radius, x, y, _keeps_apart(x, y, radius, earlier).all(dim=2))
        if proposals is not None and slot > 0:
            overlapping = proposals.of_slot(slot, choices, earlier, shape, angle, is_covered)
            choices = Placement(*(torch.cat(pair, dim=1) for pair in zip(overlapping, choices, strict=True)))
        best = choices.placed.to(torch.int8).argmax(dim=1, keepdim=True)  # the first possible one
        for target, values in zip(result, choices, strict=True):
            target[:, slot] = values.gather(1, best)[:, 0]
        result.placed[:, slot] &= slot < wanted
        if proposals is not None and slot > 0:
            overlaps = (best < _PROPOSALS) & result.placed[:, slot, None]
            anchor = proposals.anchors(slot)
            is_covered.scatter_(1, anchor, is_covered.gather(1, anchor) | overlaps)
    return result


class _Proposals:
    """Candidate places in front of an earlier object, the anchor."""

    def __init__(self, draws: Draws) -> None:
        self._wishes = draws.uniform(MAX_OBJECTS) < _OVERLAP_WISH
        self._anchor_words = draws.words(MAX_OBJECTS)
        self._angles = draws.integers(MAX_OBJECTS * _PROPOSALS, UNIT).view(-1, MAX_OBJECTS, _PROPOSALS)
        # Distance of the centres in percent of the sum of both radii.
        self._percents = 40 + draws.integers(MAX_OBJECTS * _PROPOSALS, 56).view(-1, MAX_OBJECTS, _PROPOSALS)

    def anchors(self, slot: int) -> Tensor:
        """Slot of the object that the object in `slot` wants to lie in front of: [B, 1]."""
        return self._anchor_words[:, slot, None] % slot

    def of_slot(
        self, slot: int, choices: Placement, earlier: Placement, shape: Tensor, angle: Tensor, is_covered: Tensor
    ) -> Placement:
        """Return candidates [B, _PROPOSALS] in the object's own size; `placed` tells which are possible."""
        anchor = self.anchors(slot)
        size, radius = (values[:, :1].expand(-1, _PROPOSALS) for values in (choices.size, choices.radius))
        back = Outline(*(values.gather(1, anchor) for values in (shape, earlier.x, earlier.y, earlier.radius, angle)))
        distance = (radius + back.radius) * self._percents[:, slot] // 100
        direction = self._angles[:, slot]
        x = back.x + distance * cosines(radius.device)[direction] // UNIT
        y = back.y + distance * cosines(radius.device)[(direction - UNIT // 4) % UNIT] // UNIT

        front = Outline(shape[:, slot, None], x, y, radius, angle[:, slot, None])
        share = hidden_share(back, front)
        is_visible = (share >= CLEARLY_HIDDEN) & (share <= most_hidden(back.form, len(SHAPES)))
        is_anchor = torch.arange(slot, device=x.device) == anchor  # [B, slot]
        keeps_apart = (_keeps_apart(x, y, radius, earlier) | is_anchor[:, None]).all(dim=2)
        is_allowed = self._wishes[:, slot, None] & earlier.placed.gather(1, anchor) & ~is_covered.gather(1, anchor)
        fits = is_visible & keeps_apart & is_allowed & _is_clear_of_borders(x, radius) & _is_clear_of_borders(y, radius)
        return Placement(size, radius, x, y, fits)


def _keeps_apart(x: Tensor, y: Tensor, radius: Tensor, others: Placement) -> Tensor:
    """Tell which candidates [B, K] keep clear of which placed objects [B, N]: [B, K, N]."""
    distance = (x[:, :, None] - others.x[:, None]) ** 2 + (y[:, :, None] - others.y[:, None]) ** 2
    needed = (radius[:, :, None] + others.radius[:, None] + _GAP) ** 2
    return (distance >= needed) | ~others.placed[:, None]


def _spread(words: Tensor, radius: Tensor) -> Tensor:
    """Turn 32-bit words into centre coordinates that keep clear of the image edges and of the 3x3 cell borders."""
    low, third = radius + _BORDER, UNIT // 3
    edge = third - _CELL_BAND - low  # usable length of the first and of the last cell
    middle = third - 2 * _CELL_BAND
    offset = (words * (2 * edge + middle)) >> 32
    coordinate = low + offset
    coordinate = torch.where(offset >= edge, coordinate + 2 * _CELL_BAND, coordinate)
    return torch.where(offset >= edge + middle, coordinate + 2 * _CELL_BAND, coordinate)


def _is_clear_of_borders(centre: Tensor, radius: Tensor) -> Tensor:
    """Tell whether coordinates keep the distances that `_spread` keeps."""
    third = UNIT // 3
    from_cells = torch.minimum((centre - third).abs(), (centre - 2 * third).abs())
    return (torch.minimum(centre, UNIT - centre) >= radius + _BORDER) & (from_cells >= _CELL_BAND)
