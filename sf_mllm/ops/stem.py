"""The whole stem: its convolution, then what stands behind it."""

from collections.abc import Callable

from torch import Tensor

from sf_mllm.ops.convolution import convolve
from sf_mllm.ops.implementations import REFERENCE, choose
from sf_mllm.ops.pooling import pool_and_normalise


def apply_stem(pixel_values: Tensor, weight: Tensor, bias: Tensor, implementation: str = REFERENCE) -> Tensor:
    """Convolve images, pool the result, normalise its channels; under autocast in its precision.

    Args:
        pixel_values: [B, 3, H, W].
        weight: [C, 3, 7, 7], of the convolution.
        bias: [C], of the convolution.
        implementation: a name of `STEM_IMPLEMENTATIONS`.

    Returns:
        [B, C, ceil(H/4), ceil(W/4)]; whole pixels lie together in memory (channels last). Over the channels of each
        pixel the mean is 0 and the biased variance 1.

    Raises:
        ValueError: the implementation is not loaded.
    """
    return choose(STEM_IMPLEMENTATIONS, implementation)(pixel_values, weight, bias)


def _convolve_then_pool(pixel_values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The reference, by those of its two steps."""
    return pool_and_normalise(convolve(pixel_values, weight, bias, REFERENCE), REFERENCE)


STEM_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {REFERENCE: _convolve_then_pool}
"""Functions of pixels, weight and bias; by name. `sf_mllm.ops.kernels` loads further ones."""
