"""Sinusoidal code of a RoI."""

import math

import torch
from torch import Tensor

HIGHEST_FREQUENCY = 128.0
OCTAVES = math.log2(HIGHEST_FREQUENCY)
"""From the lowest frequency, 1, to the highest."""


def encode_rois(rois: Tensor, width: int) -> Tensor:
    """Encode the four edges of RoIs by sines and cosines of log-spaced frequencies.

    Each frequency contributes either a sine (even index) or a cosine (odd index), never both. The code carries no
    gradient: RoIs learn through the sampling points only. The highest frequency multiplies an error of a RoI by 402, so
    everything here is fp32.

    Args:
        rois: [..., 4], image-relative xyxy.
        width: D, divisible by 4, at least 8.

    Returns:
        [..., D], fp32: the codes of x1, y1, x2, y2 one after the other, in each the sines before the cosines.

    Source: arXiv 2312.01987; positional encoding of the official code.
    """
    num_frequencies = width // 4
    # As powers of 2, which GPUs have in hardware: a compiler has them computed for each sine anew. Counted from the
    # highest one, whose rounding weighs most.
    octaves = torch.linspace(-OCTAVES, 0.0, num_frequencies, device=rois.device, dtype=torch.float32)
    frequencies = math.pi * HIGHEST_FREQUENCY * torch.exp2(octaves)  # [K]
    angles = rois.detach().float()[..., None] * frequencies  # [..., 4, K]
    code = torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
    return code.flatten(-2)
