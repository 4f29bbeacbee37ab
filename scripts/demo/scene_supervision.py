"""What makes a small CLIP bind attributes to objects: twin scenes with one edit, and labels of single patches."""

import dataclasses

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import COLORS, DOMAINS, MAX_OBJECTS, TEXTURES, UNIT
from sf_mllm.data.scenes.draws import Draws, constant
from sf_mllm.data.scenes.sampling import ABSENT, Scenes, choose, other_shape, shows_texture

_SWAP_COLORS, _SWAP_SHAPES, _SWAP_BOTH, _MIRROR, _FLIP, _TRANSPOSE, _NEW_COLOR, _NEW_SHAPE, _DROP = range(9)
_SWAP_TEXTURES, _NEW_TEXTURE, _SWAP_DEPTH = range(9, 12)
_EDITS = (
    *(_SWAP_COLORS, _SWAP_COLORS, _SWAP_SHAPES, _SWAP_SHAPES, _SWAP_BOTH, _SWAP_BOTH),
    *(_MIRROR, _FLIP, _TRANSPOSE, _NEW_COLOR, _NEW_SHAPE, _DROP),
)
_CLUTTER_EDITS = (*_EDITS, _SWAP_TEXTURES, _SWAP_TEXTURES, _NEW_SHAPE, _NEW_TEXTURE, _SWAP_DEPTH, _SWAP_DEPTH)
_SLOT_FIELDS = ("size", "color", "shape", "texture", "x", "y", "radius", "angle")


def make_twins(scenes: Scenes, draws: Draws) -> Scenes:
    """Copy each scene with one edit; background, sizes and slots stay, objects stay apart.

    Edits: exchange colours and/or shapes of two objects, mirror, flip or transpose the positions, give one object
    another colour or shape, drop the last object. In cluttered scenes also: exchange two textures, give one object
    another texture, bring the hidden one of two overlapping objects to the front. Where an edit is impossible, or would
    leave an object that cannot be told for what it is, one object changes.
    """
    is_cluttered = DOMAINS[scenes.domain].is_cluttered
    edits = _CLUTTER_EDITS if is_cluttered else _EDITS
    edit = constant(edits, draws.device)[draws.integers(1, len(edits))[:, 0]]
    wants_color = (edit == _SWAP_COLORS) | (edit == _SWAP_BOTH)
    wants_shape = (edit == _SWAP_SHAPES) | (edit == _SWAP_BOTH)
    wants_texture, wants_depth = edit == _SWAP_TEXTURES, edit == _SWAP_DEPTH
    differs = _differ(scenes.color) & wants_color[:, None, None]
    differs = differs | (_differ(scenes.shape) & wants_shape[:, None, None])
    if is_cluttered:
        shows = shows_texture(scenes.size, scenes.shape)
        has_two_textures = _differ(scenes.texture) & shows[:, :, None] & shows[:, None]
        differs = differs | (has_two_textures & wants_texture[:, None, None])
        differs = differs | ((scenes.hidden > 0) & wants_depth[:, None, None])
    is_possible = differs & scenes.present[:, :, None] & scenes.present[:, None]
    score = draws.uniform(MAX_OBJECTS**2).view_as(is_possible).masked_fill(~is_possible, -1).flatten(1)
    pair = score.argmax(dim=1, keepdim=True)
    one, two = pair // MAX_OBJECTS, pair % MAX_OBJECTS
    can_swap = is_possible.flatten(1).any(dim=1)
    drops = (edit == _DROP) & (scenes.count > 1)

    wants_swap = wants_color | wants_shape | wants_texture | wants_depth
    falls_back = (wants_swap & ~can_swap) | ((edit == _DROP) & ~drops)
    prefers_color = draws.uniform(1)[:, 0] < 0.5
    changes_color = (edit == _NEW_COLOR) | (falls_back & prefers_color)
    changes_shape = (edit == _NEW_SHAPE) | (falls_back & ~prefers_color)
    target = draws.words(1) % scenes.count[:, None]  # [B, 1]

    def edit_attribute(values: Tensor, swaps: Tensor, changes: Tensor, other: Tensor) -> Tensor:
        swapped = values.scatter(1, one, values.gather(1, two)).scatter(1, two, values.gather(1, one))
        changed = values.scatter(1, target, other)
        return torch.where((swaps & can_swap)[:, None], swapped, torch.where(changes[:, None], changed, values))

    def other_value(values: Tensor, number: int) -> Tensor:
        return (values.gather(1, target) + 1 + draws.integers(1, number - 1)) % number

    other_color = other_value(scenes.color, len(COLORS))
    color = edit_attribute(scenes.color, wants_color, changes_color, other_color)
    new_shape = other_shape(scenes.shape.gather(1, target), draws.words(1))
    shape = edit_attribute(scenes.shape, wants_shape, changes_shape, new_shape)
    x, y = scenes.x, scenes.y
    is_transposed = (edit == _TRANSPOSE)[:, None]
    x, y = torch.where(is_transposed, y, x), torch.where(is_transposed, x, y)
    x = torch.where((edit == _MIRROR)[:, None], UNIT - x, x)
    y = torch.where((edit == _FLIP)[:, None], UNIT - y, y)

    count = scenes.count - drops.long()
    present = torch.arange(MAX_OBJECTS, device=draws.device) < count[:, None]
    twins = dataclasses.replace(
        scenes,
        count=count,
        size=torch.where(present, scenes.size, ABSENT),
        color=torch.where(present, color, ABSENT),
        shape=torch.where(present, shape, ABSENT),
        texture=torch.where(present, scenes.texture, ABSENT),
        x=torch.where(present, x, 0),
        y=torch.where(present, y, 0),
        radius=torch.where(present, scenes.radius, 1),
    )
    if not is_cluttered:
        return twins

    other_texture = other_value(twins.texture, len(TEXTURES))
    texture = edit_attribute(twins.texture, wants_texture, edit == _NEW_TEXTURE, other_texture)
    slots = torch.arange(MAX_OBJECTS, device=draws.device).expand_as(x)
    exchanged = slots.scatter(1, one, two).scatter(1, two, one)
    order = torch.where((wants_depth & can_swap)[:, None], exchanged, slots)
    twins = dataclasses.replace(twins, texture=texture, tint=twins.tint.gather(1, order[..., None].expand(-1, -1, 3)))
    twins = dataclasses.replace(twins, **{name: getattr(twins, name).gather(1, order) for name in _SLOT_FIELDS})
    twins = twins.update_hidden()
    recolored = dataclasses.replace(scenes, color=scenes.color.scatter(1, target, other_color))
    return choose(twins.is_legible, twins, recolored)


def _differ(values: Tensor) -> Tensor:
    """Tell which pairs of slots [B, 8] hold different values: [B, 8, 8]."""
    return values[:, :, None] != values[:, None]


def patch_owners(scenes: Scenes, grid: int) -> Tensor:
    """Tell which object each patch of a square grid shows.

    A patch belongs to an object when its centre lies inside the bounding circle, of several to the one whose centre is
    nearest in radii; the patch at an object's centre always belongs to it or to one that overlaps it.

    Returns:
        [B, grid * grid] slot of the object, or -1; rows run from the top.
    """
    centre = (torch.arange(grid, device=scenes.count.device) * 2 + 1) * UNIT // (2 * grid)
    dx = centre[None, None, None, :] - scenes.x[:, :, None, None]  # [B, 8, 1, grid]
    dy = centre[None, None, :, None] - scenes.y[:, :, None, None]
    distance = (dx**2 + dy**2).flatten(2)  # [B, 8, grid^2]
    half_diagonal_squared = UNIT**2 // (2 * grid**2)
    reach = (scenes.radius**2).clamp(min=half_diagonal_squared)[..., None]
    is_out = (distance > reach) | ~scenes.present[..., None]
    distance = (distance * UNIT // reach).masked_fill(is_out, UNIT**3)
    nearest, owner = distance.min(dim=1)
    return torch.where(nearest < UNIT**3, owner, -1)
