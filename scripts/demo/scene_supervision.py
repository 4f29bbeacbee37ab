"""What makes a small CLIP bind attributes to objects: twin scenes with one edit, and labels of single patches."""

import dataclasses

import torch
from torch import Tensor

from sf_mllm.data.scene_sampling import ABSENT, COLORS, MAX_OBJECTS, SHAPES, UNIT, Draws, Scenes, constant

_SWAP_COLORS, _SWAP_SHAPES, _SWAP_BOTH, _MIRROR, _FLIP, _TRANSPOSE, _NEW_COLOR, _NEW_SHAPE, _DROP = range(9)
_EDITS = (
    *(_SWAP_COLORS, _SWAP_COLORS, _SWAP_SHAPES, _SWAP_SHAPES, _SWAP_BOTH, _SWAP_BOTH),
    *(_MIRROR, _FLIP, _TRANSPOSE, _NEW_COLOR, _NEW_SHAPE, _DROP),
)


def make_twins(scenes: Scenes, draws: Draws) -> Scenes:
    """Copy each scene with one edit; background, sizes and slots stay, objects stay apart.

    Edits: exchange colours and/or shapes of two objects, mirror, flip or transpose the positions, give one object
    another colour or shape, drop the last object. Where an exchange or a drop is impossible, one object changes.
    """
    edit = constant(_EDITS, draws.device)[draws.integers(1, len(_EDITS))[:, 0]]
    wants_color = (edit == _SWAP_COLORS) | (edit == _SWAP_BOTH)
    wants_shape = (edit == _SWAP_SHAPES) | (edit == _SWAP_BOTH)
    differs = (scenes.color[:, :, None] != scenes.color[:, None]) & wants_color[:, None, None]
    differs = differs | ((scenes.shape[:, :, None] != scenes.shape[:, None]) & wants_shape[:, None, None])
    is_possible = differs & scenes.present[:, :, None] & scenes.present[:, None]
    score = draws.uniform(MAX_OBJECTS**2).view_as(is_possible).masked_fill(~is_possible, -1).flatten(1)
    pair = score.argmax(dim=1, keepdim=True)
    one, two = pair // MAX_OBJECTS, pair % MAX_OBJECTS
    can_swap = is_possible.flatten(1).any(dim=1)
    drops = (edit == _DROP) & (scenes.count > 1)

    falls_back = ((wants_color | wants_shape) & ~can_swap) | ((edit == _DROP) & ~drops)
    prefers_color = draws.uniform(1)[:, 0] < 0.5
    changes_color = (edit == _NEW_COLOR) | (falls_back & prefers_color)
    changes_shape = (edit == _NEW_SHAPE) | (falls_back & ~prefers_color)
    target = draws.words(1) % scenes.count[:, None]  # [B, 1]

    def edit_attribute(values: Tensor, swaps: Tensor, changes: Tensor, number: int) -> Tensor:
        swapped = values.scatter(1, one, values.gather(1, two)).scatter(1, two, values.gather(1, one))
        other = (values.gather(1, target) + 1 + draws.integers(1, number - 1)) % number
        changed = values.scatter(1, target, other)
        return torch.where((swaps & can_swap)[:, None], swapped, torch.where(changes[:, None], changed, values))

    color = edit_attribute(scenes.color, wants_color, changes_color, len(COLORS))
    shape = edit_attribute(scenes.shape, wants_shape, changes_shape, len(SHAPES))
    x, y = scenes.x, scenes.y
    is_transposed = (edit == _TRANSPOSE)[:, None]
    x, y = torch.where(is_transposed, y, x), torch.where(is_transposed, x, y)
    x = torch.where((edit == _MIRROR)[:, None], UNIT - x, x)
    y = torch.where((edit == _FLIP)[:, None], UNIT - y, y)

    count = scenes.count - drops.long()
    present = torch.arange(MAX_OBJECTS, device=draws.device) < count[:, None]
    return dataclasses.replace(
        scenes,
        count=count,
        size=torch.where(present, scenes.size, ABSENT),
        color=torch.where(present, color, ABSENT),
        shape=torch.where(present, shape, ABSENT),
        x=torch.where(present, x, 0),
        y=torch.where(present, y, 0),
        radius=torch.where(present, scenes.radius, 1),
    )


def patch_owners(scenes: Scenes, grid: int) -> Tensor:
    """Tell which object each patch of a square grid shows.

    A patch belongs to an object when its centre lies inside the bounding circle; the patch at an object's centre always
    does.

    Returns:
        [B, grid * grid] slot of the object, or -1; rows run from the top.
    """
    centre = (torch.arange(grid, device=scenes.count.device) * 2 + 1) * UNIT // (2 * grid)
    dx = centre[None, None, None, :] - scenes.x[:, :, None, None]  # [B, 8, 1, grid]
    dy = centre[None, None, :, None] - scenes.y[:, :, None, None]
    distance = (dx**2 + dy**2).flatten(2)  # [B, 8, grid^2]
    half_diagonal_squared = UNIT**2 // (2 * grid**2)
    reach = (scenes.radius**2).clamp(min=half_diagonal_squared)[..., None]
    distance = distance.masked_fill((distance > reach) | ~scenes.present[..., None], UNIT**3)
    nearest, owner = distance.min(dim=1)
    return torch.where(nearest < UNIT**3, owner, -1)
