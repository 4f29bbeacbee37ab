"""A vision tower as it is measured, whatever library it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from sf_mllm.bench.sizes import ImageSize

RANDOM = "random"
"""Weights of a tower that was not trained."""


@dataclass(frozen=True)
class Tower:
    """A frozen tower in float32 on the CPU.

    Attributes:
        module: normalised pixels [B, 3, H, W] to the tokens [B, N, D] that a language model would read.
        weights: "random", or where trained ones come from.
        size: of the images that it sees here.
        mean: of the channels, subtracted from pixels in 0..1.
        std: that they are divided by then.
        preprocess: from a picture to pixels [3, H, W], as the tower's library does it; None if it has no such part.
        kernels: of an encoder of ours, those that it is timed with; None: those it starts with, as the reference does.
        reference: another implementation with the same weights, whose tokens in eager float32 are those to be computed;
            None: the module itself.
        tolerances: by precision, the largest relative errors that pass where those of `precision.TOLERANCES` do not
            fit.
    """

    module: nn.Module
    weights: str
    size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocess: Callable[[Image.Image], Tensor] | None
    kernels: str | None = None
    reference: nn.Module | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.module.requires_grad_(False).eval()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn pixels [B, 3, H, W] uint8 into what the module takes, float32."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels / 255 - mean) / std


TowerLoader = Callable[[ImageSize | None], Tower]
"""Builds a tower for images of a size; None: of its own."""
