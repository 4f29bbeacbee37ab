"""Procedural scenes: coloured shapes on a background, as integer attributes that are the same on every device.

Every random number is a hash of (seed, stream, scene index), so scene i of a seed does not depend on batch size, order
or device. All geometry is in integers of 1/4096 of the image side: comparisons are exact, only pixels are rounded.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from sf_mllm.errors import InputError

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
SIZES = ("small", "medium", "large")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
"""Cells of a 3x3 grid in reading order; place // 3 is the row, place % 3 the column."""

MAX_OBJECTS = 8
UNIT = 4096
"""Length of the image side in scene units."""
ABSENT = -1
"""Attribute value in the slots behind the last object."""
BACKGROUNDS = ("plain", "gradient", "noise")
NOISE_CELLS = 5
"""Side of the random grid that the noise background is interpolated from."""

RADII = (246, 369, 532)  # bounding circle of small, medium, large: 0.06, 0.09 and 0.13 of the image side
RADIUS_JITTER_PERCENT = 6
MAX_RADIUS = RADII[-1] * (100 + RADIUS_JITTER_PERCENT) // 100
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
_GAP = 41  # free space between two bounding circles
_BORDER = 20  # free space between a bounding circle and the image edge
_CELL_BAND = 61  # centres keep this far from the borders of the 3x3 cells, so that a place is never ambiguous
_CANDIDATES_PER_SIZE = 12
_WORD = 0xFFFFFFFF
_WORDS_AT_ONCE = 256


@dataclass
class ScenesConfig:
    """Which scenes to make."""

    seed: int = 0  # 0 .. 2**32 - 1; training and held-out scenes differ in the seed
    min_objects: int = 1  # 1 .. max_objects
    max_objects: int = MAX_OBJECTS  # min_objects .. 8
    image_size: int = 224  # pixels, at least 32

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _WORD:
            raise InputError(f"Scene seed {self.seed} is out of range; give a whole number from 0 to {_WORD}.")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise InputError(
                f"Scenes with {self.min_objects} to {self.max_objects} objects cannot be made; "
                f"give 1 <= min_objects <= max_objects <= {MAX_OBJECTS}."
            )
        if self.image_size < 32:
            raise InputError(f"Scene image_size {self.image_size} is too small; give at least 32 pixels.")


@dataclass
class Scenes:
    """A batch of scenes; the tensors live on one device. Slots behind the last object hold `ABSENT` attributes."""

    count: Tensor  # [B] objects in the scene
    size: Tensor  # [B, 8] index into SIZES
    color: Tensor  # [B, 8] index into COLORS
    shape: Tensor  # [B, 8] index into SHAPES
    x: Tensor  # [B, 8] centre, 0 left edge .. UNIT right edge
    y: Tensor  # [B, 8] centre, 0 top edge .. UNIT bottom edge
    radius: Tensor  # [B, 8] of the bounding circle
    angle: Tensor  # [B, 8] rotation, UNIT is a full turn
    tint: Tensor  # [B, 8, 3] added to the colour's RGB
    background: Tensor  # [B] index into BACKGROUNDS
    background_rgb: Tensor  # [B, 2, 3] 0..255, the two ends of the gradient or noise
    background_angle: Tensor  # [B] direction of the gradient, UNIT is a full turn
    background_noise: Tensor  # [B, NOISE_CELLS, NOISE_CELLS] 0..255

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

    def to(self, device: str | torch.device) -> "Scenes":
        """Return the scenes on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, index: Tensor | slice) -> "Scenes":
        """Return the scenes at an index, mask or slice of the batch axis."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Scenes":
        return Scenes(**{field.name: function(getattr(self, field.name)) for field in dataclasses.fields(self)})


BatchT = TypeVar("BatchT")


def concatenate(parts: Sequence[BatchT]) -> BatchT:
    """Join batches of scenes, or of captions, along the batch axis; all fields are tensors."""
    names = [field.name for field in dataclasses.fields(parts[0])]  # type: ignore[arg-type]
    return type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@lru_cache(maxsize=128)
def constant(values: tuple, device: torch.device) -> Tensor:
    """Return a tensor of fixed values, copied to a device once: a copy in each step would make the GPU wait."""
    return torch.tensor(values, device=device)


def sample_scenes(indices: Tensor, config: ScenesConfig) -> Scenes:
    """Make the scenes with the given indices, on the device of `indices`.

    Args:
        indices: [B] int64, 0 .. 2**32 - 1.
        config: seed and number of objects; `image_size` plays no part.
    """
    draws = Draws(config.seed, indices)
    wanted = config.min_objects + draws.integers(1, config.max_objects - config.min_objects + 1)[:, 0]  # [B]
    color = _draw_attribute(draws, len(COLORS))
    shape = _draw_attribute(draws, len(SHAPES))
    size = draws.integers(MAX_OBJECTS, len(SIZES))
    jitter_percent = 100 - RADIUS_JITTER_PERCENT + draws.integers(MAX_OBJECTS, 2 * RADIUS_JITTER_PERCENT + 1)
    size, radius, x, y, placed = _place_objects(draws, size, jitter_percent, wanted)
    angle = draws.integers(MAX_OBJECTS, UNIT)
    tint = draws.integers(MAX_OBJECTS * 3, 2 * _TINT + 1).view(-1, MAX_OBJECTS, 3) - _TINT

    background = draws.integers(1, len(BACKGROUNDS))[:, 0]
    # Backgrounds are nearly grey, so that no object colour can hide in them.
    grey = 30 + draws.integers(2, 211)[:, :, None]  # [B, 2, 1]
    background_rgb = (grey + draws.integers(6, 31).view(-1, 2, 3) - 15).clamp(0, 255)
    background_angle = draws.integers(1, UNIT)[:, 0]
    background_noise = draws.integers(NOISE_CELLS**2, 256).view(-1, NOISE_CELLS, NOISE_CELLS)

    # An object that found no room is left out: bring the placed ones to the front, in their order.
    order = placed.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    count = placed.sum(dim=1)
    present = torch.arange(MAX_OBJECTS, device=indices.device) < count[:, None]

    def pack(values: Tensor, empty: int) -> Tensor:
        return torch.where(present, values.gather(1, order), empty)

    return Scenes(
        count=count,
        size=pack(size, ABSENT),
        color=pack(color, ABSENT),
        shape=pack(shape, ABSENT),
        x=pack(x, 0),
        y=pack(y, 0),
        radius=pack(radius, 1),
        angle=angle,
        tint=tint,
        background=background,
        background_rgb=background_rgb,
        background_angle=background_angle,
        background_noise=background_noise,
    )


class Draws:
    """Random integers for each scene index; each request uses streams of its own."""

    def __init__(self, seed: int, indices: Tensor) -> None:
        self._seed = seed
        self._indices = indices[:, None].to(torch.int64)
        self._next_stream = 0
        self._ready = self._indices[:, :0]  # words made but not yet handed out: few large requests are quicker

    @property
    def device(self) -> torch.device:
        """Device of the scene indices, on which all numbers are drawn."""
        return self._indices.device

    def words(self, count: int) -> Tensor:
        """Return the next `count` 32-bit words of each scene: [B, count] int64, 0 .. 2**32 - 1."""
        if self._ready.shape[1] < count:
            number = max(count, _WORDS_AT_ONCE)
            streams = torch.arange(self._next_stream, self._next_stream + number, device=self.device)
            self._next_stream += number
            # The seed enters each stream separately: two seeds cannot give the same scenes under shifted indices.
            keys = _mix(_mix(streams + 0x9E3779B9) ^ _mix(self._seed))
            self._ready = torch.cat((self._ready, _mix(_mix(keys ^ self._indices))), dim=1)
        words, self._ready = self._ready[:, :count], self._ready[:, count:]
        return words

    def integers(self, count: int, bound: int) -> Tensor:
        """Return [B, count] integers from 0 to bound - 1; `bound` is far below 2**31."""
        return (self.words(count) * bound) >> 32

    def uniform(self, count: int) -> Tensor:
        """Return [B, count] float32 in [0, 1), multiples of 2**-24 and so the same on every device."""
        return (self.words(count) >> 8).to(torch.float32) * 2.0**-24


WordT = TypeVar("WordT", int, Tensor)


def _mix(words: WordT) -> WordT:
    """Scramble 32-bit words held in int64; one-to-one.

    Source: constants of Chris Wellons' hash-prospector (public domain), both below 2**31, so no product overflows.
    """
    words = words & _WORD
    words = ((words ^ (words >> 16)) * 0x21F0AAAD) & _WORD
    words = ((words ^ (words >> 15)) * 0x735A2D97) & _WORD
    return words ^ (words >> 15)


def _draw_attribute(draws: Draws, values: int) -> Tensor:
    """Draw an attribute with 8 values for each slot: [B, 8].

    Two scenes in five use only two or three values, so that "how many red objects" has answers above one.
    """
    palette = constant((8, 8, 8, 3, 2), draws.device)[draws.integers(1, 5)]  # [B, 1]
    first = draws.integers(1, values)
    step = 2 * draws.integers(1, values // 2) + 1  # odd: consecutive multiples are distinct modulo 8
    choice = (draws.words(MAX_OBJECTS) * palette) >> 32
    return (first + step * choice) % values


def _place_objects(
    draws: Draws, size: Tensor, jitter_percent: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Put objects one after the other where they overlap no earlier one.

    Each object tries a list of places in its own size, then smaller ones. Returns size, radius, x, y [B, 8] and a mask
    of the objects that found room.
    """
    candidates = len(SIZES) * _CANDIDATES_PER_SIZE
    shrink = torch.arange(candidates, device=size.device) // _CANDIDATES_PER_SIZE  # 0 0 .. 1 1 .. 2 2
    sizes = (size[:, :, None] - shrink).clamp(min=0)  # [B, 8, K]
    radii = constant(RADII, size.device)[sizes] * jitter_percent[:, :, None] // 100
    xs = _spread(draws.words(MAX_OBJECTS * candidates).view_as(radii), radii)
    ys = _spread(draws.words(MAX_OBJECTS * candidates).view_as(radii), radii)

    chosen = [torch.empty_like(size) for _ in range(4)]
    out_size, out_radius, out_x, out_y = chosen
    placed = torch.zeros_like(size, dtype=torch.bool)
    for slot in range(MAX_OBJECTS):
        x, y, radius = xs[:, slot], ys[:, slot], radii[:, slot]  # [B, K]
        distance = (x[:, :, None] - out_x[:, None, :slot]) ** 2 + (y[:, :, None] - out_y[:, None, :slot]) ** 2
        needed = (radius[:, :, None] + out_radius[:, None, :slot] + _GAP) ** 2
        is_free = ((distance >= needed) | ~placed[:, None, :slot]).all(dim=2)  # [B, K]
        best = is_free.to(torch.int8).argmax(dim=1, keepdim=True)  # the first free one
        placed[:, slot] = is_free.any(dim=1) & (slot < wanted)
        for target, values in zip(chosen, (sizes[:, slot], radius, x, y), strict=True):
            target[:, slot] = values.gather(1, best)[:, 0]
    return out_size, out_radius, out_x, out_y, placed


def _spread(words: Tensor, radius: Tensor) -> Tensor:
    """Turn 32-bit words into centre coordinates that keep clear of the image edges and of the 3x3 cell borders."""
    low, third = radius + _BORDER, UNIT // 3
    edge = third - _CELL_BAND - low  # usable length of the first and of the last cell
    middle = third - 2 * _CELL_BAND
    offset = (words * (2 * edge + middle)) >> 32
    coordinate = low + offset
    coordinate = torch.where(offset >= edge, coordinate + 2 * _CELL_BAND, coordinate)
    return torch.where(offset >= edge + middle, coordinate + 2 * _CELL_BAND, coordinate)
