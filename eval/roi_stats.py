"""Where an encoder looks: do its regions follow the objects of held-out scenes?

Protocols `scenes-rois-2`, `clutter-rois-2`: scenes of seed 2,000,000,011 with 1 to 8 objects, at the resolution of the
encoder's image processor; an object is its bounding circle. The figures have the names that a training run gives them
(`scene-rois-1`: the same figures under other names). Command: `python -m eval.roi_stats ENCODER_DIR [--tasks clutter]`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.assets import resolve_demo
from sf_mllm.errors import InputError, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

    from sf_mllm.encoder.modeling_sparseformer import SparseFormerOutput


def measure(encoder_directory: str, samples: int, device: str, task_set: str = "scenes") -> dict[str, float]:
    """Run a saved encoder over held-out scenes, see `sf_mllm.training.bootstrap.roi_statistics.measure_on_scenes`."""
    from sf_mllm.data.scenes.tasks import TASK_SETS
    from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
    from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
    from sf_mllm.training.bootstrap.roi_statistics import measure_on_scenes

    if task_set not in TASK_SETS:
        raise InputError(f"There are no scenes '{task_set}'; --tasks takes: {', '.join(TASK_SETS)}.")
    if samples < 2:
        raise InputError(f"--samples {samples} is too few; give at least 2.")
    directory = resolve_demo(encoder_directory)
    encoder = SparseFormerModel.from_pretrained(directory).to(device).eval()
    processor = SparseFormerImageProcessor.from_pretrained(directory)

    def encode(pixels: "Tensor") -> "SparseFormerOutput":
        pixel_values = processor(pixels, return_tensors="pt")["pixel_values"].to(device)
        return encoder(pixel_values, output_sampling_points=True)

    image_size = processor.size.height or processor.size.shortest_edge
    return measure_on_scenes(encode, samples, image_size=image_size, device=device, task_set=task_set)


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.roi_stats", description="Where an encoder looks in scenes.")
    parser.add_argument("encoder", help="encoder directory, or an sf_llava directory, or demo:sf_llava")
    parser.add_argument("--tasks", default="scenes", help="kind of scenes: scenes or clutter (default: scenes)")
    parser.add_argument("--samples", type=int, default=512, help="scenes (default: 512)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--rows", type=Path, help="folder whose roi_stats.csv the results are appended to")
    options = parser.parse_args(arguments)
    numbers = measure(options.encoder, options.samples, options.device, options.tasks)
    for name, value in numbers.items():
        print(f"{name:24} {value:.4f}")
    if options.rows is not None:
        from eval.rows import append_rows

        row = {"model": options.encoder, "protocol": f"{options.tasks}-rois-2", "samples": options.samples}
        rows = [{**row, "metric": name, "value": round(value, 6)} for name, value in numbers.items()]
        append_rows("roi_stats", rows, options.device, options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
