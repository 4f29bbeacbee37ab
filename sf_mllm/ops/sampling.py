"""Bilinear reads of a feature map at continuous points."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE, choose


def sample_points(
    feature_map: Tensor, points_rel: Tensor, *, padding_mode: str, implementation: str = REFERENCE
) -> Tensor:
    """Read bilinear features at continuous points.

    Gradients reach the RoIs through `points_rel`.

    Args:
        feature_map: [B, C, H, W], any floating dtype.
        points_rel: [B, N, P, 2], fp32, (x, y) relative to the image: 0 left/top edge, 1 right/bottom edge; may lie
            outside. [1, N, P, 2] if all images share them.
        padding_mode: "zeros" or "border", as in `grid_sample`; decides values outside the image.
        implementation: a name of `SAMPLING_IMPLEMENTATIONS`.

    Returns:
        [B, N, P, C] in the dtype of `feature_map`; interpolated in fp32, since a bf16 coordinate can be a tenth of a
        feature pixel off.

    Raises:
        ValueError: batch sizes differ, the last axis is not 2, or the implementation is not loaded.
    """
    points = prepare_points(feature_map, points_rel)
    return choose(SAMPLING_IMPLEMENTATIONS, implementation)(feature_map, points, padding_mode)


def prepare_points(feature_map: Tensor, points_rel: Tensor) -> Tensor:
    """Return points in a feature map [B, C, H, W] as [B, N, P, 2], fp32; their batch size may have been 1.

    Raises:
        ValueError: batch sizes differ, or the last axis of the points is not 2.
    """
    if points_rel.shape[-1] != 2 or len(points_rel) not in (1, len(feature_map)):
        raise ValueError(
            f"Points must be [B, N, P, 2] with the batch size of the feature map or 1, "
            f"got points {tuple(points_rel.shape)} and features {tuple(feature_map.shape)}."
        )
    return points_rel.float().expand(len(feature_map), -1, -1, -1)


def _sample_by_grid_sample(feature_map: Tensor, points: Tensor, padding_mode: str) -> Tensor:
    """The reference, by PyTorch's own operation."""
    if padding_mode == "border":
        # As on a GPU. On a CPU PyTorch (2.11, 2.14) takes NaN for a place in memory and writes a gradient there.
        points = points.nan_to_num(nan=0.0)
    sampled = F.grid_sample(
        feature_map.float(), 2 * points - 1, mode="bilinear", padding_mode=padding_mode, align_corners=False
    )  # [B, C, N, P]
    return sampled.permute(0, 2, 3, 1).to(feature_map.dtype)


SAMPLING_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {REFERENCE: _sample_by_grid_sample}
"""Functions of the feature map [B, C, H, W], the points [B, N, P, 2], fp32, and the padding mode; by name.
`sf_mllm.ops.kernels` loads further ones."""
