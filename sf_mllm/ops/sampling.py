"""Bilinear reads of a feature map at continuous points: the reference definition."""

import torch.nn.functional as F
from torch import Tensor


def sample_points(feature_map: Tensor, points_rel: Tensor, *, padding_mode: str) -> Tensor:
    """Read bilinear features at continuous points.

    Gradients reach the RoIs through `points_rel`.

    Args:
        feature_map: [B, C, H, W], any floating dtype.
        points_rel: [B, N, P, 2], fp32, (x, y) relative to the image: 0 left/top edge, 1 right/bottom edge; may lie
            outside.
        padding_mode: "zeros" or "border", as in `grid_sample`; decides values outside the image.

    Returns:
        [B, N, P, C] in the dtype of `feature_map`; interpolated in fp32, since a bf16 coordinate can be a tenth of a
        feature pixel off.

    Raises:
        ValueError: batch sizes differ or the last axis is not 2.
    """
    if points_rel.shape[-1] != 2 or points_rel.shape[0] != feature_map.shape[0]:
        raise ValueError(
            f"Points must be [B, N, P, 2] with the batch size of the feature map, "
            f"got points {tuple(points_rel.shape)} and features {tuple(feature_map.shape)}."
        )
    points_grid = 2 * points_rel.float() - 1
    sampled = F.grid_sample(
        feature_map.float(), points_grid, mode="bilinear", padding_mode=padding_mode, align_corners=False
    )  # [B, C, N, P]
    return sampled.permute(0, 2, 3, 1).to(feature_map.dtype)
