"""Procedural scenes: coloured objects on a background, as integer attributes that are the same on every device.

Every random number is a hash of (seed, stream, scene index), so scene i of a seed does not depend on batch size, order
or device. All geometry is in integers of 1/4096 of the image side: comparisons are exact, only pixels are rounded.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import (
    BACKGROUNDS,
    COLORS,
    DOMAINS,
    GLYPHS,
    MAX_OBJECTS,
    MAX_RADIUS,
    RADIUS_JITTER_PERCENT,
    SHAPES,
    UNIT,
)
from sf_mllm.data.scenes.draws import LARGEST_WORD, Draws, constant
from sf_mllm.data.scenes.glyphs import DOODLES
from sf_mllm.data.scenes.overlap import Outline, hidden_shares, most_hidden
from sf_mllm.data.scenes.placement import place_objects
from sf_mllm.errors import InputError, nearest

ABSENT = -1
"""Attribute value in the slots behind the last object."""
NOISE_CELLS = 5
"""Side of the random grid that the noise background is interpolated from."""
GRAIN_CELLS = 28
"""Side of the finer grid that adds grain to a cluttered background."""
MAX_DOODLES = 10
RELATION_MARGIN = UNIT // 10
"""Two centres count as left/right or above/below of each other only when they differ by at least this much."""

_COLOR_RGB = (
    (220, 40, 40),
    (245, 135, 30),
    (245, 215, 50),
    (40, 160, 60),
    (60, 205, 215),
    (45, 85, 220),
    (130, 50, 185),
    (250, 125, 190),
)
_TINT = 14  # largest deviation of an object's channel from its colour
_TILT = 228  # largest rotation of glyphs and crosses in cluttered scenes, 20 degrees: a turned cross is an x
_GLYPH_SHARE = (5, 8)  # of the objects in cluttered scenes


@dataclass
class ScenesConfig:
    """Which scenes to make."""

    seed: int = 0  # 0 .. 2**32 - 1; training and held-out scenes differ in the seed
    min_objects: int = 1  # 1 .. max_objects
    max_objects: int = MAX_OBJECTS  # min_objects .. 8
    image_size: int = 224  # pixels, at least 32
    domain: str = "plain"  # one of DOMAINS
    shapes: tuple[str, ...] | None = None  # all that objects may be, equally often; None: whatever the domain has

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_WORD:
            raise InputError(f"Scene seed {self.seed} is out of range; give a whole number from 0 to {LARGEST_WORD}.")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise InputError(
                f"Scenes with {self.min_objects} to {self.max_objects} objects cannot be made; "
                f"give 1 <= min_objects <= max_objects <= {MAX_OBJECTS}."
            )
        if self.image_size < 32:
            raise InputError(f"Scene image_size {self.image_size} is too small; give at least 32 pixels.")
        if self.domain not in DOMAINS:
            raise InputError(f"Scene domain '{self.domain}' is unknown; choose one of: {', '.join(DOMAINS)}.")
        for shape in self.shapes or ():
            if shape not in DOMAINS[self.domain].shapes:
                raise InputError(
                    f"Shape '{shape}' is none of domain '{self.domain}'.{nearest(shape, DOMAINS[self.domain].shapes)}"
                )


@dataclass
class Scenes:
    """A batch of scenes of one domain; the tensors live on one device.

    Slots behind the last object hold `ABSENT` attributes. `hidden` follows from the other fields: `update_hidden` after
    an edit of shape or geometry.
    """

    count: Tensor  # [B] objects in the scene
    size: Tensor  # [B, 8] index into the domain's sizes
    color: Tensor  # [B, 8] index into COLORS
    shape: Tensor  # [B, 8] index into the domain's shapes
    texture: Tensor  # [B, 8] index into TEXTURES
    x: Tensor  # [B, 8] centre, 0 left edge .. UNIT right edge
    y: Tensor  # [B, 8] centre, 0 top edge .. UNIT bottom edge
    radius: Tensor  # [B, 8] of the bounding circle
    angle: Tensor  # [B, 8] rotation, UNIT is a full turn
    tint: Tensor  # [B, 8, 3] added to the colour's RGB
    hidden: Tensor  # [B, 8, 8] thousandths of the second object that the first one hides; later slots lie in front
    background: Tensor  # [B] index into BACKGROUNDS
    background_rgb: Tensor  # [B, 2, 3] 0..255, the two ends of the gradient or noise
    background_angle: Tensor  # [B] direction of the gradient, UNIT is a full turn
    background_noise: Tensor  # [B, NOISE_CELLS, NOISE_CELLS] 0..255
    # Of cluttered domains only; the second axis of the first two is empty in others.
    doodles: Tensor  # [B, MAX_DOODLES, 6] form, x, y, radius, angle, grey level of background strokes
    grain: Tensor  # [B, GRAIN_CELLS, GRAIN_CELLS] 0..255, added to the background
    exposure: Tensor  # [B, 3] gain in percent, amplitude of the pixel noise in grey levels, key of the pixel noise
    domain: str = "plain"

    def __len__(self) -> int:
        return len(self.count)

    @property
    def present(self) -> Tensor:
        """[B, 8], true for slots that hold an object."""
        return torch.arange(MAX_OBJECTS, device=self.count.device) < self.count[:, None]

    @property
    def place(self) -> Tensor:
        """[B, 8] index into PLACES of each object's centre, `ABSENT` in empty slots."""
        cell = (3 * self.y // UNIT) * 3 + 3 * self.x // UNIT
        return torch.where(self.present, cell, ABSENT)

    @property
    def rgb(self) -> Tensor:
        """[B, 8, 3] colour of each object, 0..255."""
        base = constant(_COLOR_RGB, self.color.device)[self.color.clamp(min=0)]
        return (base + self.tint).clamp(0, 255)

    @property
    def outlines(self) -> Outline:
        """Geometry of the objects, [B, 8] each."""
        return Outline(self.shape, self.x, self.y, self.radius, self.angle)

    def update_hidden(self) -> "Scenes":
        """Return the scenes with `hidden` computed anew; in a domain without overlap nothing is hidden."""
        if not DOMAINS[self.domain].is_cluttered:
            return self
        return dataclasses.replace(self, hidden=hidden_shares(self.outlines, self.present))

    @property
    def is_legible(self) -> Tensor:
        """[B], true where every object can be told for what it is: enough of it and of its texture can be seen."""
        is_seen = self.hidden.sum(dim=1) <= most_hidden(self.shape, len(SHAPES))
        is_seen = is_seen & ((self.texture <= 0) | shows_texture(self.size, self.shape))
        return (is_seen | ~self.present).all(dim=1)

    def to(self, device: str | torch.device) -> "Scenes":
        """Return the scenes on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, index: Tensor | slice) -> "Scenes":
        """Return the scenes at an index, mask or slice of the batch axis."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Scenes":
        changed: dict[str, Any] = {name: function(value) for name, value in tensor_fields(self).items()}
        return dataclasses.replace(self, **changed)


BatchT = TypeVar("BatchT")


def tensor_fields(batch: object) -> dict[str, Any]:
    """Return the tensors of scenes or captions by field name; the other fields are the same for the whole batch."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def concatenate(parts: Sequence[BatchT]) -> BatchT:
    """Join batches of scenes, or of captions, of one domain along the batch axis."""
    tensors = [tensor_fields(part) for part in parts]
    joined = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    return dataclasses.replace(parts[0], **joined)  # type: ignore[type-var]


def choose(condition: Tensor, first: BatchT, second: BatchT) -> BatchT:
    """Take the scenes, or captions, of `first` where the condition [B] holds, else those of `second`."""
    chosen = {}
    for name, values in tensor_fields(first).items():
        expanded = condition.view(-1, *(1,) * (values.dim() - 1))
        chosen[name] = torch.where(expanded, values, getattr(second, name))
    return dataclasses.replace(first, **chosen)  # type: ignore[type-var]


def sample_scenes(indices: Tensor, config: ScenesConfig) -> Scenes:
    """Make the scenes with the given indices, on the device of `indices`.

    Args:
        indices: [B] int64, 0 .. 2**32 - 1.
        config: seed, domain and number of objects; `image_size` plays no part.
    """
    domain = DOMAINS[config.domain]
    draws = Draws(config.seed, indices)
    wanted = config.min_objects + draws.integers(1, config.max_objects - config.min_objects + 1)[:, 0]  # [B]
    color = _draw_attribute(draws, len(COLORS))
    shape = _draw_attribute(draws, len(SHAPES))
    if config.shapes:
        choices = constant(tuple(domain.shapes.index(name) for name in config.shapes), indices.device)
        shape = choices[draws.integers(MAX_OBJECTS, len(choices))]
    elif len(domain.shapes) > len(SHAPES):
        glyph = len(SHAPES) + _draw_attribute(draws, len(GLYPHS))
        shape = torch.where(draws.integers(MAX_OBJECTS, _GLYPH_SHARE[1]) < _GLYPH_SHARE[0], glyph, shape)
    size = draws.integers(MAX_OBJECTS, len(domain.sizes))
    jitter_percent = 100 - RADIUS_JITTER_PERCENT + draws.integers(MAX_OBJECTS, 2 * RADIUS_JITTER_PERCENT + 1)
    is_cluttered = domain.is_cluttered
    angle = _draw_tilted(draws, shape) if is_cluttered else torch.zeros_like(shape)
    size, radius, x, y, placed = place_objects(
        draws, domain, size, jitter_percent, wanted, shape, angle, most=config.max_objects
    )
    # An object that found no room is left out: bring the placed ones to the front, in their order.
    order = placed.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    count = placed.sum(dim=1)
    present = torch.arange(MAX_OBJECTS, device=indices.device) < count[:, None]

    def pack(values: Tensor, empty: int) -> Tensor:
        return torch.where(present, values.gather(1, order), empty)

    size, color, shape = pack(size, ABSENT), pack(color, ABSENT), pack(shape, ABSENT)
    angle = pack(angle, 0) if is_cluttered else draws.integers(MAX_OBJECTS, UNIT)
    tint = draws.integers(MAX_OBJECTS * 3, 2 * _TINT + 1).view(-1, MAX_OBJECTS, 3) - _TINT

    background = draws.integers(1, len(BACKGROUNDS))[:, 0]
    # Backgrounds are nearly grey, so that no object colour can hide in them.
    grey = 30 + draws.integers(2, 211)[:, :, None]  # [B, 2, 1]
    background_rgb = (grey + draws.integers(6, 31).view(-1, 2, 3) - 15).clamp(0, 255)
    background_angle = draws.integers(1, UNIT)[:, 0]
    background_noise = draws.integers(NOISE_CELLS**2, 256).view(-1, NOISE_CELLS, NOISE_CELLS)

    texture = _draw_attribute(draws, len(domain.textures)) if is_cluttered else torch.zeros_like(shape)
    texture = torch.where(shows_texture(size, shape), texture, 0)
    empty = indices[:, None][:, :0]  # [B, 0]
    scenes = Scenes(
        count=count,
        size=size,
        color=color,
        shape=shape,
        texture=torch.where(present, texture, ABSENT),
        x=pack(x, 0),
        y=pack(y, 0),
        radius=pack(radius, 1),
        angle=angle,
        tint=tint,
        hidden=torch.zeros_like(count)[:, None, None].repeat(1, MAX_OBJECTS, MAX_OBJECTS),
        background=background,
        background_rgb=background_rgb,
        background_angle=background_angle,
        background_noise=background_noise,
        doodles=_draw_doodles(draws) if is_cluttered else empty[..., None].expand(-1, -1, 6),
        grain=draws.integers(GRAIN_CELLS**2, 256).view(-1, GRAIN_CELLS, GRAIN_CELLS)
        if is_cluttered
        else empty[..., None],
        exposure=_draw_exposure(draws) if is_cluttered else empty,
        domain=config.domain,
    )
    return scenes.update_hidden() if config.max_objects > 1 else scenes


def shows_texture(size: Tensor, shape: Tensor) -> Tensor:
    """Tell where a pattern could be seen in a cluttered domain: not on tiny objects, nor on small glyphs.

    Args:
        size: index into the sizes of a cluttered domain.
        shape: index into its shapes, of the same size.
    """
    return size > (shape >= len(SHAPES)).long()


def other_shape(shape: Tensor, words: Tensor) -> Tensor:
    """Return another value of the same kind for each shape: a shape becomes a shape, a glyph a glyph.

    Args:
        shape: index into the shapes of any domain.
        words: random 32-bit words, of the same size.
    """
    is_glyph = shape >= len(SHAPES)
    start, number = torch.where(is_glyph, len(SHAPES), 0), torch.where(is_glyph, len(GLYPHS), len(SHAPES))
    return start + (shape - start + 1 + ((words * (number - 1)) >> 32)) % number


def _draw_attribute(draws: Draws, values: int) -> Tensor:
    """Draw an attribute with an even number of values for each slot: [B, 8].

    Two scenes in five use only two or three values, so that "how many red objects" has answers above one.
    """
    palette = constant((8, 8, 8, 3, 2), draws.device)[draws.integers(1, 5)]  # [B, 1]
    first = draws.integers(1, values)
    step = 2 * draws.integers(1, values // 2) + 1  # odd: consecutive multiples are distinct modulo 8
    choice = (draws.words(MAX_OBJECTS) * palette) >> 32
    return (first + step * choice) % values


def _draw_tilted(draws: Draws, shape: Tensor) -> Tensor:
    """Draw angles: glyphs and crosses stand nearly upright, other shapes turn freely."""
    is_upright = (shape >= len(SHAPES)) | (shape == SHAPES.index("cross"))
    tilted = (draws.integers(MAX_OBJECTS, 2 * _TILT + 1) - _TILT) % UNIT
    return torch.where(is_upright, tilted, draws.integers(MAX_OBJECTS, UNIT))


def _draw_doodles(draws: Draws) -> Tensor:
    """Draw grey strokes anywhere in the image: [B, MAX_DOODLES, 6]."""
    bounds = (len(DOODLES), UNIT, UNIT, MAX_RADIUS - 250, UNIT, 141)
    form, x, y, radius, angle, grey = (draws.integers(MAX_DOODLES, bound) for bound in bounds)
    return torch.stack((form + DOODLES.start, x, y, radius + 250, angle, grey + 60), dim=-1)


def _draw_exposure(draws: Draws) -> Tensor:
    """Draw gain 85..115 percent, noise amplitude 0..12 grey levels and the key of the noise: [B, 3]."""
    return torch.cat((85 + draws.integers(1, 31), draws.integers(1, 13), draws.words(1)), dim=1)
