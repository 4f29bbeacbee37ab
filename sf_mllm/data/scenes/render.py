"""Draw scenes: each object is a signed distance on a small patch, put onto the background."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.scenes.domains import BACKGROUNDS, DOMAINS, MAX_RADIUS, TEXTURES, UNIT
from sf_mllm.data.scenes.draws import mix_bits
from sf_mllm.data.scenes.glyphs import TABLE_REACH, distance_tables
from sf_mllm.data.scenes.overlap import Outline
from sf_mllm.data.scenes.sampling import Scenes
from sf_mllm.data.scenes.shapes import shape_distance

# Cluttered domains; lengths in radii of the object's bounding circle unless said otherwise.
_CONTOUR = 16  # width of the dark contour around objects, in scene units: equal colours stay apart
_CONTOUR_GREY = 24.0
_PATTERN_DARKENING = 0.62  # of the dark part of a pattern; its hue stays
_STRIPE_PERIOD, _DOT_PERIOD, _CHECK_PERIOD = 0.46, 0.4, 0.56
_DOT_RADIUS = 0.12
_GRAIN = 14.0  # grey levels
_DOODLE_OPACITY = 0.5


def render(scenes: Scenes, image_size: int = 224) -> Tensor:
    """Draw a batch of scenes on the device that holds them.

    CPU and GPU agree to one grey level.

    Args:
        scenes: B scenes.
        image_size: side in pixels, at least 32.

    Returns:
        [B, 3, image_size, image_size] uint8, RGB.
    """
    draw = _draw_cluttered if DOMAINS[scenes.domain].is_cluttered else _draw_plain
    return draw(scenes, image_size).round().clamp(0, 255).to(torch.uint8)


class _Patches(NamedTuple):
    """Square patches around K objects of each scene."""

    u: Tensor  # [B, K, P, P] pixels in the object's own frame, in radii of its bounding circle
    v: Tensor
    position: Tensor  # [B, K, P^2] the pixels' indices into the flattened image
    radius: Tensor  # [B, K, 1, 1] of the bounding circle in pixels


def _cut_patches(objects: Outline, image_size: int) -> _Patches:
    pixels_per_unit = image_size / UNIT
    patch = 2 * math.ceil(MAX_RADIUS * pixels_per_unit + 1) + 1
    centre = torch.stack((objects.x, objects.y), dim=-1)  # [B, K, 2]
    # Centres lie inside the image, so a patch pushed back inside still covers all that is seen of its object.
    corner = (centre * image_size // UNIT - patch // 2).clamp(0, image_size - patch)
    pixel = corner[..., None] + torch.arange(patch, device=centre.device)  # [B, K, 2, P], x then y

    offset = pixel + 0.5 - (centre * pixels_per_unit)[..., None]  # pixels from the centre
    radius = objects.radius * pixels_per_unit  # [B, K]
    offset = offset / radius[..., None, None]
    x, y = offset[:, :, 0, None, :], offset[:, :, 1, :, None]  # [B, K, 1, P], [B, K, P, 1]
    angle = (objects.angle * (2 * math.pi / UNIT))[..., None, None]
    cos, sin = angle.cos(), angle.sin()
    position = pixel[:, :, 1, :, None] * image_size + pixel[:, :, 0, None, :]
    return _Patches(cos * x + sin * y, cos * y - sin * x, position.flatten(2), radius[..., None, None])


def _draw_plain(scenes: Scenes, image_size: int) -> Tensor:
    """Draw objects that keep apart: [B, 3, H, W] float, 0..255."""
    patches = _cut_patches(scenes.outlines, image_size)
    distance = shape_distance(patches.u, patches.v, scenes.shape[..., None, None])
    alpha = (0.5 - distance * patches.radius).clamp(0, 1)  # one pixel of anti-aliasing
    alpha = (alpha * scenes.present[..., None, None]).flatten(2)  # [B, 8, P^2]

    # Bounding circles are disjoint: at most one object is added to a pixel, so the order of additions does not matter.
    rgb = scenes.rgb.to(alpha.dtype)
    layers = [alpha.flatten(1)] + [(alpha * rgb[:, :, channel, None]).flatten(1) for channel in range(3)]
    painted = torch.zeros(len(scenes), 4, image_size**2, device=alpha.device, dtype=alpha.dtype)
    painted.scatter_add_(2, patches.position.flatten(1)[:, None].expand(-1, 4, -1), torch.stack(layers, dim=1))
    painted = painted.view(-1, 4, image_size, image_size)
    return _draw_background(scenes, image_size) * (1 - painted[:, :1]) + painted[:, 1:]


def _draw_cluttered(scenes: Scenes, image_size: int) -> Tensor:
    """Draw doodles, then objects from the hindmost to the foremost, and expose the image: [B, 3, H, W] float."""
    background = _draw_background(scenes, image_size)
    grain = scenes.grain[:, None].float() / 255 - 0.5
    grain = F.interpolate(grain, size=(image_size, image_size), mode="bilinear", align_corners=True)
    canvas = (background + 2 * _GRAIN * grain).flatten(2)  # [B, 3, HW]

    *doodles, grey = scenes.doodles.unbind(dim=-1)
    number = len(grey[0])
    both = Outline(*(torch.cat(pair, dim=1) for pair in zip(doodles, scenes.outlines, strict=True)))
    patches = _cut_patches(both, image_size)
    distance = _table_distance(both.form.clamp(min=0), patches.u, patches.v) * patches.radius  # pixels
    alpha = (0.5 - distance).clamp(0, 1)
    with_contour = (0.5 + _CONTOUR * image_size / UNIT - distance).clamp(0, 1)[:, number:]
    doodle_alpha = _DOODLE_OPACITY * alpha[:, :number].flatten(2)
    object_alpha = (with_contour * scenes.present[..., None, None]).flatten(2)
    tone = 1 - _PATTERN_DARKENING * _pattern(scenes.texture, _Patches(*(values[:, number:] for values in patches)))
    fill = scenes.rgb[..., None].float() * tone.flatten(2)[:, :, None]  # [B, 8, 3, P^2]
    rgb = _CONTOUR_GREY + (fill - _CONTOUR_GREY) * alpha[:, number:].flatten(2)[:, :, None]

    for item in range(both.form.shape[1]):
        position = patches.position[:, item, None].expand(-1, 3, -1)
        below = canvas.gather(2, position)
        if item < number:
            color, opacity = grey[:, item, None, None].float(), doodle_alpha[:, item, None]
        else:
            color, opacity = rgb[:, item - number], object_alpha[:, item - number, None]
        canvas.scatter_(2, position, below + opacity * (color - below))

    gain, amplitude, key = scenes.exposure[..., None].unbind(dim=1)  # [B, 1] each
    words = mix_bits(key ^ mix_bits(torch.arange(image_size**2, device=key.device)))  # [B, HW]
    noise = torch.stack([(words >> shift & 255).float() / 127.5 - 1 for shift in (0, 8, 16)], dim=1)
    canvas = canvas * (gain / 100)[:, None] + noise * amplitude[:, None]
    return canvas.view(-1, 3, image_size, image_size)


def _table_distance(form: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Look the distance of forms [B, K] up at points [B, K, P, P], in radii of the bounding circle."""
    tables = distance_tables(form.device)[form].flatten(0, 1)[:, None]  # [B * K, 1, 65, 65]
    grid = (torch.stack((u, v), dim=-1) / TABLE_REACH).flatten(0, 1)
    return F.grid_sample(tables, grid, padding_mode="border", align_corners=True).view_as(u)


def _pattern(texture: Tensor, patches: _Patches) -> Tensor:
    """Darkness of the patterns [B, 8] at each pixel: [B, 8, P, P], 0 light .. 1 dark, anti-aliased."""
    u, v, radius = patches.u, patches.v, patches.radius

    def wave(t: Tensor, period: float) -> Tensor:
        """Half of each period is dark."""
        phase = (t / period - torch.floor(t / period) - 0.5).abs() - 0.25
        return (0.5 + phase * (period * radius)).clamp(0, 1)

    across, down = wave(u, _CHECK_PERIOD), wave(v, _CHECK_PERIOD)
    dot_u, dot_v = (((t / _DOT_PERIOD) - torch.floor(t / _DOT_PERIOD) - 0.5) * _DOT_PERIOD for t in (u, v))
    patterns = {
        "striped": wave((u + v) / math.sqrt(2), _STRIPE_PERIOD),
        "dotted": (0.5 + (_DOT_RADIUS - torch.sqrt(dot_u**2 + dot_v**2)) * radius).clamp(0, 1),
        "checked": across + down - 2 * across * down,
    }
    result = torch.zeros_like(u)
    for name, darkness in patterns.items():
        result = torch.where(texture[..., None, None] == TEXTURES.index(name), darkness, result)
    return result


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
