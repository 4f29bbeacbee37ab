"""Digits, letters and background doodles as strokes, and tables of every form of cluttered scenes.

The strokes are this project's own; no font is involved.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import GLYPHS, SHAPES
from sf_mllm.data.scenes.shapes import shape_distance

# Strokes on a grid of 0..4 (right) by 0..6 (down); a stroke is a chain of two-digit points, x then y. What is easily
# taken for something else has a mark of its own: 0 a slash, 1 a foot, 7 none, I two bars, Q a long tail, Z a bar.
_STROKES = {
    "digit 0": "10 30 41 45 36 16 05 01 10/14 32",
    "digit 1": "02 20 26/06 46",
    "digit 2": "01 10 30 41 42 06 46",
    "digit 3": "01 10 30 41 42 33 23/33 44 45 36 16 05",
    "digit 4": "36 30 04 44",
    "digit 5": "40 00 03 33 44 45 36 16 05",
    "digit 6": "41 30 10 01 05 16 36 45 44 33 13 04",
    "digit 7": "00 40 16",
    "digit 8": "10 30 41 42 33 13 02 01 10/33 44 45 36 16 05 04 13",
    "digit 9": "05 16 36 45 41 30 10 01 02 13 33 42",
    "letter a": "06 20 46/14 34",
    "letter b": "33 03 00 30 41 42 33 44 45 36 06 03",
    "letter c": "41 30 10 01 05 16 36 45",
    "letter d": "00 20 42 44 26 06 00",
    "letter e": "40 00 06 46/03 33",
    "letter f": "40 00 06/03 33",
    "letter g": "41 30 10 01 05 16 36 45 43 23",
    "letter h": "00 06/40 46/03 43",
    "letter i": "10 30/20 26/16 36",
    "letter j": "10 40/30 35 26 16 05 04",
    "letter k": "00 06/40 03 46",
    "letter l": "00 06 46",
    "letter m": "06 00 23 40 46",
    "letter n": "06 00 46 40",
    "letter o": "10 30 41 45 36 16 05 01 10",
    "letter p": "06 00 30 41 42 33 03",
    "letter q": "10 30 41 45 36 16 05 01 10/23 46",
    "letter r": "06 00 30 41 42 33 03/23 46",
    "letter s": "41 30 10 01 02 13 33 44 45 36 16 05",
    "letter t": "00 40/20 26",
    "letter u": "00 05 16 36 45 40",
    "letter v": "00 26 40",
    "letter w": "00 16 23 36 40",
    "letter x": "00 46/40 06",
    "letter y": "00 23 40/23 26",
    "letter z": "00 40 06 46/13 33",
}
_DOODLES = {"bar": "20 26", "arc": "01 10 30 41", "dash": "22 24", "bend": "00 04 44", "dots": "11 11/33 33/15 15"}
"""Uncaptioned strokes of the background."""

FORMS = (*SHAPES, *GLYPHS, *_DOODLES)
"""Everything that cluttered scenes draw; the shapes of objects come first, in the order of their domain."""
DOODLES = range(len(SHAPES) + len(GLYPHS), len(FORMS))
"""Indices of the background doodles."""

MASK_CELLS = 24
"""Side of a form's occupancy table."""
_TABLE_SIZE = 65  # samples of a distance table, from one edge of its square to the other
TABLE_REACH = 1.15
"""Half the side of a distance table's square, in radii of the bounding circle."""
_GRID_UNIT = 0.235  # of the stroke grid, in radii of the bounding circle
_HALF_STROKE = 0.14


@torch.compiler.assume_constant_result  # a compiled renderer shall hold the tables, not the making of them
def distance_tables(device: torch.device) -> Tensor:
    """Signed distance to the outline of each form, negative inside, in radii of the bounding circle.

    Returns:
        [forms, 65, 65] float32; rows run down and columns right, from -TABLE_REACH to TABLE_REACH.
    """
    return _distance_tables(device)


@lru_cache(maxsize=8)
def _distance_tables(device: torch.device) -> Tensor:
    axis = torch.linspace(-TABLE_REACH, TABLE_REACH, _TABLE_SIZE, dtype=torch.float64)
    return _distances(axis).to(device, torch.float32)


@lru_cache(maxsize=8)
def form_masks(device: torch.device) -> Tensor:
    """Which cells of the square around its bounding circle each form fills.

    Returns:
        [forms, 24, 24] bool; cell centres run from -23/24 to 23/24 of the radius, rows down, columns right.
    """
    axis = (torch.arange(MASK_CELLS, dtype=torch.float64) * 2 + 1) / MASK_CELLS - 1
    return (_distances(axis) < 0).to(device)


def _distances(axis: Tensor) -> Tensor:
    """Distance of every form at the points (axis x axis): [forms, n, n] float64."""
    u, v = axis[None, :].expand(len(axis), -1), axis[:, None].expand(-1, len(axis))
    shapes = shape_distance(u, v, torch.arange(len(SHAPES))[:, None, None])
    shapes = torch.maximum(shapes, torch.sqrt(u * u + v * v) - 1)  # the star's field has no end beyond its tips
    strokes = [_stroke_distance(u, v, text) for text in (*(_STROKES[name] for name in GLYPHS), *_DOODLES.values())]
    return torch.cat((shapes, torch.stack(strokes)))


def _stroke_distance(u: Tensor, v: Tensor, strokes: str) -> Tensor:
    """Distance to a pen's strokes with round ends."""
    point = torch.stack((u, v), dim=-1)  # [n, n, 2]
    nearest = torch.full_like(u, torch.inf)
    for chain in strokes.split("/"):
        ends = [
            torch.tensor([(int(x) - 2) * _GRID_UNIT, (int(y) - 3) * _GRID_UNIT], dtype=u.dtype)
            for x, y in map(tuple, chain.split())
        ]
        for start, end in pairwise(ends):
            along = end - start
            share = ((point - start) @ along / along.dot(along).clamp(min=1e-9)).clamp(0, 1)
            nearest = torch.minimum(nearest, (point - start - share[..., None] * along).norm(dim=-1))
    return nearest - _HALF_STROKE
