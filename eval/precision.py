"""How far reduced precision moves the encoder's outputs from fp32.

    python -m eval.precision --model sparseformer_btsp_openai_clip_base --device cuda
    python -m eval.precision --model DIRECTORY --images FOLDER --device cuda

A published name builds that size with random weights (drawn so that regions move and every path is alive); a directory
loads a trained encoder. The reference runs in fp32 with TF32 off.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.rows import append_rows
from sf_mllm import SparseFormerImageProcessor, SparseFormerModel, SparseFormerOutput
from sf_mllm.assets import resolve_demo
from sf_mllm.bench.our_towers import random_encoder
from sf_mllm.data.image_io import open_image
from sf_mllm.data.image_sources import find_images
from sf_mllm.errors import InputError, report_input_errors

MODES = ("bf16 autocast", "fp16 autocast", "bf16 model")


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.precision", description="How far reduced precision moves the encoder's outputs from fp32."
    )
    parser.add_argument(
        "--model", required=True, help="published name (random weights), encoder directory or demo:sf_llava"
    )
    parser.add_argument("--images", type=Path, help="folder of images; without it, low-frequency noise")
    parser.add_argument("--count", type=int, default=64, help="images (default 64)")
    parser.add_argument("--rows", type=Path, help="folder whose precision.csv the results are appended to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise InputError(f"--count {arguments.count} is too few; give at least 1.")

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    directory = resolve_demo(arguments.model)
    trained = Path(directory).is_dir()
    model = SparseFormerModel.from_pretrained(directory) if trained else random_encoder(arguments.model)
    model = model.eval().float().to(arguments.device)
    images = read_images(arguments.images, arguments.count, directory if trained else None).to(arguments.device)
    reference = run(model, images)
    rows = []
    for mode in MODES:
        output = run_in(mode, model, images)
        for field in ("pooler_output", "last_hidden_state", "rois"):
            ours, theirs = output[field].double(), reference[field].double()
            rows.append(
                {
                    "model": arguments.model,
                    "weights": "trained" if trained else "random",
                    "images": str(arguments.images or "noise"),
                    "count": len(images),
                    "mode": mode,
                    "field": field,
                    "max_abs_error": f"{(ours - theirs).abs().max():.3e}",
                    "relative_error": f"{(ours - theirs).norm() / theirs.norm():.3e}",
                    "max_abs_value": f"{theirs.abs().max():.3f}",
                }
            )
            row = rows[-1]
            print(f"{mode:14} {field:18} max {row['max_abs_error']}  relative {row['relative_error']}")
    if arguments.rows is not None:
        append_rows("precision", rows, arguments.device, arguments.rows)
    return 0


def read_images(folder: Path | None, count: int, model: str | None) -> torch.Tensor:
    """Return preprocessed images [count, 3, 224, 224]."""
    if folder is None:
        coarse = torch.randn(count, 3, 28, 28)
        return torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")
    paths = find_images(folder)[:count]
    processor = SparseFormerImageProcessor.from_pretrained(model) if model else SparseFormerImageProcessor()
    return processor([open_image(path) for path in paths], return_tensors="pt").pixel_values


@torch.no_grad()
def run(model: SparseFormerModel, images: torch.Tensor) -> SparseFormerOutput:
    """One forward pass."""
    return model(images)


def run_in(mode: str, model: SparseFormerModel, images: torch.Tensor) -> SparseFormerOutput:
    """One forward pass in reduced precision."""
    if mode == "bf16 model":
        return run(copy.deepcopy(model).to(torch.bfloat16), images)
    dtype = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}[mode]
    with torch.autocast(images.device.type, dtype=dtype):
        return run(model, images)


if __name__ == "__main__":
    sys.exit(main())
