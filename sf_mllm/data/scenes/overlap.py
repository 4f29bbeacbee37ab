"""How much of an object another one hides, counted in cells of the forms' occupancy tables: exact on every device."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import MAX_OBJECTS, UNIT
from sf_mllm.data.scenes.glyphs import MASK_CELLS, form_masks

CLEARLY_HIDDEN = 50
"""Thousandths of an object that another one must hide to be in front of it beyond doubt."""
MOST_HIDDEN = 240
"""Thousandths of a shape that may be hidden. The contour of what lies in front takes up to as much again of a tiny one:
three fifths of each shape can be seen."""
MOST_HIDDEN_GLYPH = 100
"""The same for a digit or a letter, which often differs from another one by a single stroke."""


class Outline(NamedTuple):
    """Geometry of objects; the tensors broadcast with each other."""

    form: Tensor  # index into `scene_glyphs.FORMS`
    x: Tensor  # centre in scene units
    y: Tensor
    radius: Tensor  # of the bounding circle
    angle: Tensor  # UNIT is a full turn


def hidden_share(back: Outline, front: Outline) -> Tensor:
    """Return the thousandths of each back object that the front object hides, at least 1 where it hides any cell.

    The contour drawn around the front object is not counted.

    Args:
        back: objects of shape [...].
        front: objects of a shape that broadcasts with [...].
    """
    device = back.form.device
    masks = form_masks(device)
    is_filled = masks[back.form]  # [..., 24, 24]
    cells = torch.arange(MASK_CELLS, device=device) * 2 + 1 - MASK_CELLS  # cell centres in 1/24 of the radius

    # Cells of the back object in the front one's frame, in 1 / (24 * UNIT^2) of a scene unit: an offset between the
    # centres, turned by the front angle, and cells, turned by the difference of the angles.
    cosine, sine = _turn(front.angle)
    dx, dy = (back.x - front.x) * MASK_CELLS * UNIT, (back.y - front.y) * MASK_CELLS * UNIT
    back_cosine, back_sine = _turn(back.angle)
    along = (back_cosine * cosine + back_sine * sine) * back.radius
    across = (back_sine * cosine - back_cosine * sine) * back.radius
    u_columns = (cosine * dx + sine * dy)[..., None] + along[..., None] * cells  # [..., 24]
    v_columns = (cosine * dy - sine * dx)[..., None] + across[..., None] * cells
    u = u_columns[..., None, :] - (across[..., None] * cells)[..., None]  # [..., 24, 24]
    v = v_columns[..., None, :] + (along[..., None] * cells)[..., None]

    cell_size = (2 * UNIT * UNIT * front.radius)[..., None, None]
    column, row = u // cell_size + MASK_CELLS // 2, v // cell_size + MASK_CELLS // 2
    is_inside = (column >= 0) & (column < MASK_CELLS) & (row >= 0) & (row < MASK_CELLS)
    last = MASK_CELLS - 1
    is_hidden = masks[front.form[..., None, None], row.clamp(0, last), column.clamp(0, last)] & is_inside & is_filled
    filled = is_filled.sum(dim=(-2, -1))
    return (is_hidden.sum(dim=(-2, -1)) * 1000 + filled - 1) // filled  # rounded up


def _turn(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of an angle, times UNIT."""
    table = cosines(angle.device)
    return table[angle], table[(angle - UNIT // 4) % UNIT]


def hidden_shares(objects: Outline, present: Tensor) -> Tensor:
    """Compare all objects of scenes; those in later slots lie in front.

    Args:
        objects: tensors [B, 8].
        present: [B, 8], slots that hold an object.

    Returns:
        [B, 8, 8]: thousandths of the second object that the first one hides.
    """
    objects = objects._replace(form=objects.form.clamp(min=0))
    result = present.new_zeros(len(present), MAX_OBJECTS, MAX_OBJECTS, dtype=torch.int64)
    for slot in range(MAX_OBJECTS - 1):
        back = Outline(*(values[:, slot, None] for values in objects))
        front = Outline(*(values[:, slot + 1 :] for values in objects))
        both = present[:, slot, None] & present[:, slot + 1 :]
        result[:, slot + 1 :, slot] = torch.where(both, hidden_share(back, front), 0)
    return result


def most_hidden(shape: Tensor, shapes: int) -> Tensor:
    """Return the thousandths that may be hidden of objects with these shapes; the first `shapes` are no glyphs."""
    return torch.where(shape < shapes, MOST_HIDDEN, MOST_HIDDEN_GLYPH)


@lru_cache(maxsize=8)
def cosines(device: torch.device) -> Tensor:
    """Cosine of each angle 0 .. UNIT - 1, times UNIT, rounded: [UNIT] int64."""
    angle = torch.arange(UNIT, dtype=torch.float64) * (2 * math.pi / UNIT)
    return (angle.cos() * UNIT).round().to(device, torch.int64)
