"""Where the regions of an encoder go, in a few numbers."""

import torch
from torch import Tensor


def describe_rois(rois: Tensor, sampling_points: tuple[Tensor, ...]) -> dict[str, float]:
    """Summarise regions and sampling points of a set of images.

    Args:
        rois: [B, N, 4], the final regions, image-relative xyxy.
        sampling_points: one [B, N, P, 2] for each sampling, image-relative.

    Returns:
        `roi_area`: mean share of the image that a region covers, clamped into the image;
        `roi_center_spread`: standard deviation over images of a region's centre, in image sizes, mean over tokens and
        axes: 0 if regions ignore the image; needs at least two images;
        `points_outside`: share of all sampling points outside the image.
    """
    corners = rois.float().unflatten(-1, (2, 2))
    size_inside = (corners.clamp(0, 1).amax(dim=-2) - corners.clamp(0, 1).amin(dim=-2)).prod(dim=-1)
    centers = corners.mean(dim=-2)  # [B, N, 2]
    points = torch.stack(sampling_points).float()
    is_outside = ((points < 0) | (points > 1)).any(dim=-1)
    return {
        "roi_area": size_inside.mean().item(),
        "roi_center_spread": centers.std(dim=0).mean().item(),
        "points_outside": is_outside.float().mean().item(),
    }
