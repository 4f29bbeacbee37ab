"""Draw scenes: each object is a signed-distance function on a small patch, added onto the background."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.scene_sampling import BACKGROUNDS, MAX_RADIUS, SHAPES, UNIT, Scenes


def render(scenes: Scenes, image_size: int = 224) -> Tensor:
    """Draw a batch of scenes on the device that holds them.

    CPU and GPU agree to one grey level.

    Args:
        scenes: B scenes.
        image_size: side in pixels, at least 32.

    Returns:
        [B, 3, image_size, image_size] uint8, RGB.
    """
    batch, device = len(scenes), scenes.count.device
    pixels_per_unit = image_size / UNIT
    patch = 2 * math.ceil(MAX_RADIUS * pixels_per_unit + 1) + 1
    centre = torch.stack((scenes.x, scenes.y), dim=-1)  # [B, 8, 2]
    # Objects lie inside the image, so a patch pushed back inside still covers its object.
    corner = (centre * image_size // UNIT - patch // 2).clamp(0, image_size - patch)
    steps = torch.arange(patch, device=device)
    pixel = corner[..., None] + steps  # [B, 8, 2, patch], x then y

    offset = pixel + 0.5 - (centre * pixels_per_unit)[..., None]  # pixels from the centre
    radius = scenes.radius * pixels_per_unit  # [B, 8]
    offset = offset / radius[..., None, None]
    u, v = offset[:, :, 0, None, :], offset[:, :, 1, :, None]  # [B, 8, 1, patch], [B, 8, patch, 1]
    angle = (scenes.angle * (2 * math.pi / UNIT))[..., None, None]
    cos, sin = angle.cos(), angle.sin()
    distance = _signed_distance(cos * u + sin * v, cos * v - sin * u, scenes.shape[..., None, None])
    alpha = (0.5 - distance * radius[..., None, None]).clamp(0, 1)  # one pixel of anti-aliasing
    alpha = (alpha * scenes.present[..., None, None]).flatten(2)  # [B, 8, patch^2]

    # Bounding circles are disjoint: at most one object is added to a pixel, so the order of additions does not matter.
    position = (pixel[:, :, 1, :, None] * image_size + pixel[:, :, 0, None, :]).view(batch, 1, -1)
    rgb = scenes.rgb.to(alpha.dtype)
    layers = [alpha.flatten(1)] + [(alpha * rgb[:, :, channel, None]).flatten(1) for channel in range(3)]
    painted = torch.zeros(batch, 4, image_size**2, device=device, dtype=alpha.dtype)
    painted.scatter_add_(2, position.expand(-1, 4, -1), torch.stack(layers, dim=1))
    painted = painted.view(batch, 4, image_size, image_size)

    image = _draw_background(scenes, image_size) * (1 - painted[:, :1]) + painted[:, 1:]
    return image.round().clamp(0, 255).to(torch.uint8)


def _draw_background(scenes: Scenes, image_size: int) -> Tensor:
    """Blend two colours by a constant, a linear ramp or smooth noise: [B, 3, H, W] float, 0..255."""
    axis = (torch.arange(image_size, device=scenes.count.device) + 0.5) / image_size - 0.5
    angle = (scenes.background_angle * (2 * math.pi / UNIT))[:, None, None]
    ramp = 0.5 + (angle.cos() * axis + angle.sin() * axis[:, None]) / math.sqrt(2)  # [B, H, W], 0..1
    noise = scenes.background_noise[:, None].float() / 255
    noise = F.interpolate(noise, size=(image_size, image_size), mode="bilinear", align_corners=True)[:, 0]
    kind = scenes.background[:, None, None]
    blend = ramp * (kind == BACKGROUNDS.index("gradient")) + noise * (kind == BACKGROUNDS.index("noise"))
    start, end = scenes.background_rgb.float()[..., None, None].unbind(dim=1)  # [B, 3, 1, 1]
    return start + (end - start) * blend[:, None]


def _signed_distance(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
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
