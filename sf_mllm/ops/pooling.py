"""What stands behind the stem's convolution: 3x3 max-pool of stride 2, ReLU, a norm of each pixel's channels."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE, choose

POOL_WINDOW, POOL_STRIDE, POOL_PADDING = 3, 2, 1
POOL_EPS = 1e-5


def pool_and_normalise(features: Tensor, implementation: str = REFERENCE) -> Tensor:
    """Keep the largest of nine pixels in each channel, what is positive of it, and normalise channels in fp32.

    Args:
        features: [B, C, H, W].
        implementation: a name of `POOLING_IMPLEMENTATIONS`.

    Returns:
        [B, C, ceil(H/2), ceil(W/2)]; over the channels of each pixel the mean is 0 and the biased variance 1.

    Raises:
        ValueError: the implementation is not loaded.
    """
    return choose(POOLING_IMPLEMENTATIONS, implementation)(features)


def _pool_by_torch(features: Tensor) -> Tensor:
    """The reference, by PyTorch's own operations."""
    # The largest value is the same before and after ReLU, which has a quarter of the work when it comes second.
    pooled = F.relu(F.max_pool2d(features, POOL_WINDOW, POOL_STRIDE, POOL_PADDING))
    pixels = pooled.float().permute(0, 2, 3, 1)
    normalised = F.layer_norm(pixels, pixels.shape[-1:], eps=POOL_EPS)
    return normalised.permute(0, 3, 1, 2).to(features.dtype)


POOLING_IMPLEMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {REFERENCE: _pool_by_torch}
"""Functions of features; by name. `sf_mllm.ops.kernels` loads further ones."""
