"""What scenes are made of: the names of all attribute values, and the domains that combine them.

"plain" scenes show coloured shapes, each apart from the others, before a quiet background. "clutter" scenes add digits
and letters, tiny objects, patterns and objects that hide a part of another one, before a restless background. An
attribute of an object is stored as an index into the names of its domain.
"""

import string
from dataclasses import dataclass

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
GLYPHS = (
    *(f"digit {digit}" for digit in string.digits),
    *(f"letter {letter}" for letter in string.ascii_lowercase),
)
"""Drawn as capital letters."""
SIZES = ("small", "medium", "large")
SIZE_ORDER = ("tiny", *SIZES)
"""All sizes, from the smallest."""
TEXTURES = ("plain", "striped", "dotted", "checked")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
"""Cells of a 3x3 grid in reading order; place // 3 is the row, place % 3 the column."""
BACKGROUNDS = ("plain", "gradient", "noise")

MAX_OBJECTS = 8
UNIT = 4096
"""Length of the image side in scene units; an angle of UNIT is a full turn."""
RADII = (246, 369, 532)  # bounding circle of small, medium, large: 0.06, 0.09 and 0.13 of the image side
RADIUS_JITTER_PERCENT = 6
MAX_RADIUS = RADII[-1] * (100 + RADIUS_JITTER_PERCENT) // 100


def plural_noun(shape: str) -> str:
    """Return "circles", "crosses" or, for a glyph, "letters k"."""
    noun, *name = shape.split()
    return " ".join((noun + ("es" if noun.endswith("s") else "s"), *name))


@dataclass(frozen=True)
class Domain:
    """One kind of scenes."""

    sizes: tuple[str, ...]  # from the smallest
    radii: tuple[int, ...]  # of each size, in scene units
    shapes: tuple[str, ...]  # the first ones are SHAPES
    textures: tuple[str, ...]  # captions name the texture where there is more than one
    is_cluttered: bool  # objects may overlap, the background is restless
    context_length: int  # tokens of the longest caption, with <bos> and <eos>
    short_length: int  # the same for relations and counts
    phrase_length: int  # the same for captions of one object

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Names of the values of each attribute that captions name, in the order of their phrases' columns."""
        named = {"size": self.sizes, "color": COLORS, "shape": self.shapes, "place": PLACES}
        return named if len(self.textures) == 1 else named | {"texture": self.textures}


DOMAINS = {
    "plain": Domain(
        sizes=SIZES,
        radii=RADII,
        shapes=SHAPES,
        textures=TEXTURES[:1],
        is_cluttered=False,
        context_length=32,  # 2 words for the number of objects, 7 * 4 for the objects
        short_length=10,  # 2 * 3 words for two objects, 2 for "left of"
        phrase_length=6,
    ),
    "clutter": Domain(
        sizes=SIZE_ORDER,
        radii=(176, *RADII),
        shapes=SHAPES + GLYPHS,
        textures=TEXTURES,
        is_cluttered=True,
        context_length=44,  # 2 words for the number of objects, 8 * 5 for the objects
        short_length=13,  # 2 * 4 words for two objects, 3 for "in front of"
        phrase_length=7,
    ),
}
"""The domains by name. New ones are added here; what a seed gives in an existing one does not change."""
