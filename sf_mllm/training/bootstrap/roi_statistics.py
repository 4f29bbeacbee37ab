"""Where the regions of an encoder go, in a few numbers."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sf_mllm.data.scenes.domains import UNIT
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, sample_scenes
from sf_mllm.data.scenes.tasks import configure_scenes
from sf_mllm.encoder.modeling_sparseformer import SparseFormerOutput
from sf_mllm.training.bootstrap.losses import average_in_rois

SCENES_SEED = 2_000_000_011
"""Seed of the scenes that regions are measured on; nothing is trained on it."""

SMALL_AREA = 0.1
"""Share of the image; a region above it says little about where an object is."""

_CHUNK = 64


def describe_rois(rois: Tensor, sampling_points: Sequence[Tensor]) -> dict[str, float]:
    """Summarise regions and sampling points of a set of images.

    Args:
        rois: [B, N, 4], the final regions, image-relative xyxy.
        sampling_points: one [B, N, P, 2] for each sampling, image-relative.

    Returns:
        `roi_area`: mean share of the image that a region covers, clamped into the image;
        `roi_center_spread`: standard deviation over images of a region's centre, in image sizes, mean over tokens and
        axes: 0 if regions ignore the image; needs at least two images;
        `roi_points_outside`: share of all sampling points outside the image, `roi_points_outside_<i>` of sampling i.
    """
    corners = rois.float().unflatten(-1, (2, 2))
    size_inside = (corners.clamp(0, 1).amax(dim=-2) - corners.clamp(0, 1).amin(dim=-2)).prod(dim=-1)
    centers = corners.mean(dim=-2)  # [B, N, 2]
    points = torch.stack(list(sampling_points)).float()
    is_outside = ((points < 0) | (points > 1)).any(dim=-1)  # [samplings, B, N, P]
    of_samplings = is_outside.float().flatten(1).mean(dim=1).tolist()
    return {
        "roi_area": size_inside.mean().item(),
        "roi_center_spread": centers.std(dim=0).mean().item(),
        "roi_points_outside": is_outside.float().mean().item(),
        **{f"roi_points_outside_{index}": share for index, share in enumerate(of_samplings)},
    }


@torch.no_grad()
def measure_on_scenes(
    encode: Callable[[Tensor], SparseFormerOutput],
    samples: int,
    *,
    image_size: int,
    device: str | torch.device,
    task_set: str = "scenes",
) -> dict[str, float]:
    """Run an encoder over held-out scenes and tell whether its regions find the objects.

    Args:
        encode: [B, 3, image_size, image_size], uint8, on the device -> output with sampling points.
        samples: number of scenes, at least two.
        image_size: side in pixels.
        device: of the encoder.
        task_set: what kind of scenes, a name of `sf_mllm.data.scenes.tasks.TASK_SETS`.

    Returns:
        The entries of `describe_rois`, and with objects as their bounding circles
        `roi_object_share`: mean share of a region that objects cover; `roi_object_share_of_image`: that of the whole
        image, to compare with; `roi_objects_covered`: share of objects whose centre lies in at least one region that
        covers less than a tenth of the image.
    """
    config: ScenesConfig = configure_scenes(task_set, seed=SCENES_SEED, image_size=image_size)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for indices in torch.arange(samples).split(_CHUNK):
        scenes = sample_scenes(indices.to(device), config)
        output = encode(render(scenes, image_size))
        assert output.rois is not None and output.sampling_points is not None
        rois = output.rois[:, -1]
        mask = draw_objects(scenes, image_size)
        centers = torch.stack([scenes.x, scenes.y], dim=-1) / UNIT  # [B, 8, 2]
        parts["rois"].append(rois)
        parts["points"].append(torch.stack(output.sampling_points, dim=1))  # [B, samplings, N, P, 2]
        parts["in_rois"].append(average_in_rois(mask, rois, points_per_side=12).flatten())
        parts["in_image"].append(mask.mean(dim=(1, 2, 3)))
        parts["covered"].append(is_in_small_roi(centers, rois)[scenes.present].float())
    merged = {name: torch.cat(values) for name, values in parts.items()}
    return describe_rois(merged["rois"], merged["points"].unbind(1)) | {
        "roi_object_share": merged["in_rois"].mean().item(),
        "roi_object_share_of_image": merged["in_image"].mean().item(),
        "roi_objects_covered": merged["covered"].mean().item(),
    }


def draw_objects(scenes: Scenes, size: int) -> Tensor:
    """Return [B, 1, size, size], 1 inside the bounding circle of an object."""
    axis = (torch.arange(size, device=scenes.x.device) + 0.5) / size * UNIT
    dx = axis[None, None, None, :] - scenes.x[..., None, None]
    dy = axis[None, None, :, None] - scenes.y[..., None, None]
    inside = dx**2 + dy**2 < scenes.radius[..., None, None] ** 2  # [B, 8, size, size]
    return (inside & scenes.present[..., None, None]).any(dim=1, keepdim=True).float()


def is_in_small_roi(centers: Tensor, rois: Tensor) -> Tensor:
    """Tell for each point [B, K, 2] whether one of the small regions among [B, N, 4] holds it: [B, K]."""
    corners = rois.unflatten(-1, (2, 2))
    low, high = corners.amin(dim=-2), corners.amax(dim=-2)  # [B, N, 2]
    area = (high.clamp(0, 1) - low.clamp(0, 1)).prod(dim=-1)
    point = centers[:, :, None]  # [B, K, 1, 2]
    inside = ((point >= low[:, None]) & (point <= high[:, None])).all(dim=-1)  # [B, K, N]
    return (inside & (area < SMALL_AREA)[:, None]).any(dim=-1)
