"""Where an encoder looks: do its regions follow the objects of held-out scenes?

Protocol `scene-rois-1`: scenes of seed 2,000,000,011 with 1 to 8 objects, at the resolution of the encoder's image
processor; an object is its bounding circle. Command: `python -m eval.roi_stats ENCODER_DIR`.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.assets import resolve_demo
from sf_mllm.errors import InputError, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

    from sf_mllm.data.scene_sampling import Scenes

PROTOCOL = "scene-rois-1"
SEED = 2_000_000_011

_CHUNK = 64
_SMALL_AREA = 0.1  # of the image; a region above it says little about where an object is


def measure(encoder_directory: str, samples: int, device: str) -> dict[str, float]:
    """Run an encoder over held-out scenes.

    Returns:
        `roi_area`, `roi_center_spread` as in `describe_rois`; `points_outside_<i>` of each sampling;
        `object_share_in_rois` against `object_share_in_image`; `centers_in_small_roi`: share of objects whose centre
        lies in at least one region that covers less than a tenth of the image.
    """
    import torch

    from sf_mllm.data.scene_render import render
    from sf_mllm.data.scene_sampling import UNIT, ScenesConfig, sample_scenes
    from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
    from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
    from sf_mllm.training.losses import average_in_rois
    from sf_mllm.training.roi_statistics import describe_rois

    if samples < 2:
        raise InputError(f"--samples {samples} is too few; give at least 2.")
    directory = resolve_demo(encoder_directory)
    encoder = SparseFormerModel.from_pretrained(directory).to(device).eval()
    processor = SparseFormerImageProcessor.from_pretrained(directory)
    size = processor.size.height or processor.size.shortest_edge
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, samples, _CHUNK):
        indices = torch.arange(start, min(start + _CHUNK, samples))
        scenes = sample_scenes(indices, ScenesConfig(seed=SEED, image_size=size))
        pixels = processor(render(scenes, size), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            output = encoder(pixels, output_sampling_points=True)
        rois = output.rois[:, -1].cpu()
        mask = draw_objects(scenes, size)
        centers = torch.stack([scenes.x, scenes.y], dim=-1) / UNIT  # [B, 8, 2]
        parts["rois"].append(rois)
        parts["points"].append(torch.stack(output.sampling_points, dim=1).cpu())
        parts["inside"].append(average_in_rois(mask, rois, points_per_side=12).flatten())
        parts["image"].append(mask.flatten())
        parts["found"].append(is_in_small_roi(centers, rois)[scenes.present].float())
    merged = {name: torch.cat(values) for name, values in parts.items()}
    samplings = merged["points"].unbind(1)
    whole = describe_rois(merged["rois"], samplings)
    outside = {
        f"points_outside_{index}": describe_rois(merged["rois"], (points,))["points_outside"]
        for index, points in enumerate(samplings)
    }
    return {
        "roi_area": whole["roi_area"],
        "roi_center_spread": whole["roi_center_spread"],
        **outside,
        "object_share_in_rois": merged["inside"].mean().item(),
        "object_share_in_image": merged["image"].mean().item(),
        "centers_in_small_roi": merged["found"].mean().item(),
    }


def draw_objects(scenes: "Scenes", size: int) -> "Tensor":
    """Return [B, 1, size, size], 1 inside the bounding circle of an object."""
    import torch

    from sf_mllm.data.scene_sampling import UNIT

    axis = (torch.arange(size) + 0.5) / size * UNIT
    dx = axis[None, None, None, :] - scenes.x[..., None, None]
    dy = axis[None, None, :, None] - scenes.y[..., None, None]
    inside = dx**2 + dy**2 < scenes.radius[..., None, None] ** 2  # [B, 8, size, size]
    return (inside & scenes.present[..., None, None]).any(dim=1, keepdim=True).float()


def is_in_small_roi(centers: "Tensor", rois: "Tensor") -> "Tensor":
    """Tell for each point [B, K, 2] whether one of the small regions among [B, N, 4] holds it: [B, K]."""
    corners = rois.unflatten(-1, (2, 2))
    low, high = corners.amin(dim=-2), corners.amax(dim=-2)  # [B, N, 2]
    area = (high.clamp(0, 1) - low.clamp(0, 1)).prod(dim=-1)
    point = centers[:, :, None]  # [B, K, 1, 2]
    inside = ((point >= low[:, None]) & (point <= high[:, None])).all(dim=-1)  # [B, K, N]
    return (inside & (area < _SMALL_AREA)[:, None]).any(dim=-1)


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.roi_stats", description="Where an encoder looks in scenes.")
    parser.add_argument("encoder", help="encoder directory, or an sf_llava directory, or demo:sf_llava")
    parser.add_argument("--samples", type=int, default=512, help="scenes (default: 512)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--rows", type=Path, help="folder whose roi_stats.csv the results are appended to")
    options = parser.parse_args(arguments)
    numbers = measure(options.encoder, options.samples, options.device)
    for name, value in numbers.items():
        print(f"{name:24} {value:.4f}")
    if options.rows is not None:
        from eval.rows import append_rows

        row = {"model": options.encoder, "protocol": PROTOCOL, "samples": options.samples}
        rows = [{**row, "metric": name, "value": round(value, 6)} for name, value in numbers.items()]
        append_rows("roi_stats", rows, options.device, options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
