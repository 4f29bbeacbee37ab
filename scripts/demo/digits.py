"""Pictures of one digit each, for a classifier: cluttered scenes with nothing but a digit, zoomed in on.

A digit has any colour, size and pattern, is tilted by up to 20 degrees, sharp or blurred, and lies anywhere in the
picture, on a restless background with grey strokes that are no digits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.scenes.domains import DOMAINS, GLYPHS, UNIT
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, sample_scenes

DIGITS = tuple(name for name in GLYPHS if name.startswith("digit "))
"""The classes, in the order of their labels."""
BACKGROUND = len(DIGITS)
"""Label of a patch that shows no digit."""
HELD_OUT_SEED = 1_000_003
"""Of the pictures that every classifier and student is measured on."""

_SHARES = (0.4, 0.85)  # diameters of digits, in sides of the picture
_SQUEEZE = 0.15  # largest difference between the sides
_VIEW_SEED_OFFSET = 4_000_000_007


@dataclass
class DigitPictures:
    """B pictures with one digit each; places and sizes are relative to the picture, (x, y)."""

    pixels: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B] index into DIGITS
    centers: Tensor  # [B, 2] of the digit
    radii: Tensor  # [B, 2] half axes of the ellipse around the digit

    def patch_labels(self, rows: int, columns: int) -> Tensor:
        """Return which digit lies at the centre of each cell of a grid: [B, rows * columns], or BACKGROUND."""
        y, x = (
            (torch.arange(count, device=self.labels.device) + 0.5) / count  # centres of the cells
            for count in (rows, columns)
        )
        cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)  # [rows * columns, 2]
        offset = (cells - self.centers[:, None]) / self.radii[:, None]
        return torch.where(offset.square().sum(dim=-1) < 1, self.labels[:, None], BACKGROUND)


def draw_digits(indices: Tensor, seed: int, image_size: int) -> DigitPictures:
    """Draw the pictures with the given indices, on the device of `indices`.

    Args:
        indices: [B] int64, 0 .. 2**32 - 1.
        seed: of the pictures.
        image_size: side in pixels.
    """
    scenes = sample_scenes(indices, ScenesConfig(seed, 1, 1, image_size, domain="clutter", shapes=DIGITS))
    low, side = _choose_views(scenes, Draws(seed + _VIEW_SEED_OFFSET, indices))
    # grid_sample's coordinates run from -1 to 1 across the scene.
    affine = torch.cat((torch.diag_embed(side), (2 * low + side - 1)[..., None]), dim=-1)  # [B, 2, 3]
    pixels = render(scenes, image_size).float()
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return DigitPictures(
        pixels=pixels.round().clamp(0, 255).to(torch.uint8),
        labels=scenes.shape[:, 0] - DOMAINS["clutter"].shapes.index(DIGITS[0]),
        centers=(_centers(scenes) - low) / side,
        radii=scenes.radius[:, :1] / UNIT / side,
    )


def _choose_views(scenes: Scenes, draws: Draws) -> tuple[Tensor, Tensor]:
    """Choose a part of each scene that holds its digit: upper left corner and sides, [B, 2] relative to the scene."""
    center, radius = _centers(scenes), scenes.radius[:, :1] / UNIT
    share = _SHARES[0] + (_SHARES[1] - _SHARES[0]) * draws.uniform(1)
    side = 2 * radius / share * (1 - _SQUEEZE * draws.uniform(2))
    least = (center + radius - side).clamp(min=0)
    most = torch.minimum(center - radius, 1 - side)
    return least + (most - least) * draws.uniform(2), side


def _centers(scenes: Scenes) -> Tensor:
    """Centres of the digits, [B, 2] relative to the scene."""
    return torch.stack((scenes.x[:, 0], scenes.y[:, 0]), dim=-1) / UNIT
