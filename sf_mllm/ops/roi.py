"""Regions of interest (RoIs): start layouts, adjustment, points.

A RoI is (x1, y1, x2, y2) relative to the image, 0 left/top edge and 1 right/bottom edge whatever the aspect ratio. It
may leave the image, and x2 < x1 is legal: sampling uses the signed size, adjustment the absolute one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def official_grid(num_latents: int) -> Tensor:
    """Half-image boxes on a square grid; what is left over of a non-square count sees the whole image.

    The left-over RoIs are all equal. With a token embedding shared by all tokens their tokens stay identical through
    the whole network and for the whole training, so this start is for parity with published models only.

    Args:
        num_latents: N >= 4.

    Returns:
        [N, 4], fp32. x is the slow index.

    Raises:
        ValueError: N < 4 has no such grid.

    Source: arXiv 2304.03768; initial_roi of the official code.
    """
    if num_latents < 4:
        raise ValueError(
            f"The official RoI grid needs at least 4 latent tokens, got {num_latents}; use 'distinct_grid'."
        )
    rows = math.isqrt(num_latents)
    left_over = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(num_latents - rows**2, 4)
    return torch.cat([_square_grid(rows, size=0.5), left_over])


def distinct_grid(num_latents: int) -> Tensor:
    """Half-image boxes on a square grid; what is left over of a non-square count gets larger boxes, all different.

    Args:
        num_latents: N >= 1.

    Returns:
        [N, 4], fp32. Equal to `official_grid` where N is a square.
    """
    rows = math.isqrt(num_latents) if num_latents >= 4 else 0
    left_over = num_latents - rows**2
    if left_over == 0:
        return _square_grid(rows, size=0.5)
    if left_over == 1:
        return torch.cat([_square_grid(rows, size=0.5), torch.tensor([[0.0, 0.0, 1.0, 1.0]])])
    larger = _square_grid(math.ceil(math.sqrt(left_over)), size=0.75)
    # Spread the picks evenly over the larger grid instead of filling it from one corner.
    picks = torch.arange(left_over) * len(larger) // left_over
    return torch.cat([_square_grid(rows, size=0.5), larger[picks]])


ROI_LAYOUTS: dict[str, Callable[[int], Tensor]] = {"distinct_grid": distinct_grid, "official_grid": official_grid}


def adjust_rois(rois: Tensor, deltas: Tensor) -> Tensor:
    """Move and scale RoIs by predicted deltas.

    Args:
        rois: [..., 4], image-relative xyxy.
        deltas: [..., 4], (dx, dy) in box sizes, then the logarithms of the width and height factors.

    Returns:
        [..., 4]; x1 <= x2 and y1 <= y2 even if the input box was flipped.

    Source: arXiv 2304.03768, section 3.2.
    """
    top_left, bottom_right = rois[..., :2], rois[..., 2:]
    size = (bottom_right - top_left).abs()
    center = (top_left + bottom_right) / 2 + deltas[..., :2] * size
    half_size = size * deltas[..., 2:].exp() / 2
    return torch.cat([center - half_size, center + half_size], dim=-1)


def points_in_rois(rois: Tensor, offsets: Tensor) -> Tensor:
    """Place sampling points inside RoIs.

    Offsets are normalised over the points of a token, so only the shape of their pattern matters: its spread is always
    a third of the box (one standard deviation) and its mean the centre of the box.

    Args:
        rois: [..., 4], image-relative xyxy.
        offsets: [..., P, 2], P >= 2.

    Returns:
        [..., P, 2], (x, y) relative to the image; may lie outside.

    Source: arXiv 2304.03768, section 3.2.
    """
    top_left, bottom_right = rois[..., None, :2], rois[..., None, 2:]
    centered = offsets - offsets.mean(dim=-2, keepdim=True)
    normalised = centered / (3 * (offsets.std(dim=-2, keepdim=True) + 1e-5))
    return (top_left + bottom_right) / 2 + normalised * (bottom_right - top_left)


def _square_grid(rows: int, size: float) -> Tensor:
    """Boxes of one size that together span the image: [rows**2, 4], x the slow index."""
    if rows == 0:
        return torch.empty(0, 4)
    starts = torch.linspace(0.0, 1.0 - size, rows) if rows > 1 else torch.tensor([(1.0 - size) / 2])
    corners = torch.cartesian_prod(starts, starts)
    return torch.cat([corners, corners + size], dim=-1)
