"""The eight shapes of scenes as signed-distance functions."""

import math

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import SHAPES


def shape_distance(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
    """Distance to the outline, negative inside, for points in units of the bounding circle's radius.

    Args:
        u: [B, 8, P, P] point in the object's own frame.
        v: [B, 8, P, P], its second coordinate; the tips of triangle and star point to positive v.
        shape: [B, 8, 1, 1] index into SHAPES.
    """
    radius = torch.sqrt(u * u + v * v)
    abs_u, abs_v = u.abs(), v.abs()
    longer, shorter = torch.maximum(abs_u, abs_v), torch.minimum(abs_u, abs_v)

    # Star: fold the plane into one of ten half-sectors; the outline there is the line from tip to notch.
    sector = torch.atan2(abs_u, v)  # 0 .. pi from the upward tip
    folded = (sector - (2 * math.pi / 5) * torch.round(sector / (2 * math.pi / 5))).abs()
    notch_u, notch_v = 0.42 * math.sin(math.pi / 5), 0.42 * math.cos(math.pi / 5)
    length = math.hypot(notch_u, 0.98 - notch_v)
    star = (radius * folded.sin() * (0.98 - notch_v) + (radius * folded.cos() - 0.98) * notch_u) / length

    # Heart: a square and a disc on each of two neighbouring sides, shifted so that the whole fits the circle.
    side, shift = 0.53, 0.28 * 0.53
    p, q = u + shift, v + shift
    box = torch.maximum(p.abs(), q.abs()) - side
    disc_p = torch.sqrt((p - side) ** 2 + q * q) - side
    disc_q = torch.sqrt(p * p + (q - side) ** 2) - side

    distances = {
        "circle": radius - 0.9,
        "square": longer - 0.7,
        "triangle": torch.maximum(0.5 * math.sqrt(3) * abs_u + 0.5 * v, -v) - 0.49,
        "star": star,
        "cross": torch.maximum(longer - 0.94, shorter - 0.3),
        "ring": (radius - 0.74).abs() - 0.22,
        "heart": torch.minimum(box, torch.minimum(disc_p, disc_q)),
        "moon": torch.maximum(radius - 0.96, 0.78 - torch.sqrt((u - 0.46) ** 2 + v * v)),
    }
    result = distances[SHAPES[0]]
    for index, name in enumerate(SHAPES[1:], start=1):
        result = torch.where(shape == index, distances[name], result)
    return result
