"""Sizes of images as they are typed; needs no library."""

from typing import NamedTuple

from sf_mllm.errors import InputError

SMALLEST, LARGEST = 32, 8192
"""Sides in pixels."""


class ImageSize(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(text: str) -> ImageSize:
    """Read "224", a square, or "1792x224", width by height.

    Raises:
        InputError: it is neither, or a side is too small or too large.
    """
    sides = text.lower().split("x")
    is_number = all(side.isascii() and side.isdecimal() for side in sides)
    if len(sides) > 2 or not is_number or not all(SMALLEST <= int(side) <= LARGEST for side in sides):
        raise InputError(
            f"Size '{text}' cannot be used; give a side such as 224, or width by height such as 1792x224, "
            f"from {SMALLEST} to {LARGEST} pixels."
        )
    return ImageSize(int(sides[0]), int(sides[-1]))
