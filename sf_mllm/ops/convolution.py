"""The stem's convolution: 7x7, stride 2, padding 3, over three channels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE, choose

STRIDE, PADDING = 2, 3


def convolve(pixel_values: Tensor, weight: Tensor, bias: Tensor, implementation: str = REFERENCE) -> Tensor:
    """Convolve images; under autocast in its precision.

    Args:
        pixel_values: [B, 3, H, W].
        weight: [C, 3, 7, 7].
        bias: [C].
        implementation: a name of `CONVOLUTION_IMPLEMENTATIONS`.

    Returns:
        [B, C, ceil(H/2), ceil(W/2)]; whole pixels lie together in memory (channels last).

    Raises:
        ValueError: the implementation is not loaded.
    """
    return choose(CONVOLUTION_IMPLEMENTATIONS, implementation)(pixel_values, weight, bias)


def _convolve_by_conv2d(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The reference, by PyTorch's own operation."""
    # Fastest for the convolution, and for what pools, normalises and samples the result.
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    return F.conv2d(pixel_values, weight, bias, stride=STRIDE, padding=PADDING)


CONVOLUTION_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {REFERENCE: _convolve_by_conv2d}
"""Functions of pixels, weight and bias; by name. `sf_mllm.ops.kernels` loads further ones."""
