"""Patch tokens as the map that they were cut from."""

import math

from torch import Tensor

from sf_mllm.errors import InputError


def side_of_grid(num_tokens: int, factor: int) -> int:
    """Return the side of a square grid of patches that falls into blocks of `factor` x `factor`.

    Raises:
        InputError: there is no such grid.
    """
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens or side % factor:
        raise InputError(
            f"{num_tokens} patches are no square grid of {factor}x{factor} blocks; take a teacher whose image has an "
            f"equal number of patches on both sides, divisible by {factor}."
        )
    return side


def to_map(tokens: Tensor, side: int) -> Tensor:
    """[B, side^2, D] -> [B, D, side, side]."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(feature_map: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, hw, D]."""
    return feature_map.flatten(2).transpose(1, 2)
