"""Write pictures of digits as files: unlabelled ones for a student to learn from, labelled ones to measure it on.

OUT/train/ holds the first, OUT/digits/digit_0/ ... OUT/digits/digit_9/ the second: a folder for `evaluation.zero_shot`.
Command: `python -m scripts.demo.digit_images OUT --count 40000 --held-out 2000`.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scripts.demo.digits import DIGITS, HELD_OUT_SEED, draw_digits
from scripts.demo.shared import refuse_used_directory
from sf_mllm.cores import count_cores
from sf_mllm.errors import CommandLineParser, InputError, report_input_errors
from sf_mllm.training.run_folder import write_directory_atomically

_CHUNK = 256  # pictures drawn at once


def export_digits(directory: Path, *, count: int, held_out: int, image_size: int, seed: int, device: str) -> None:
    """Write both sets of pictures; the directory appears under its name only when it is complete.

    Args:
        directory: to create.
        count: number of unlabelled pictures.
        held_out: number of labelled pictures.
        image_size: side in pixels.
        seed: of the unlabelled pictures.
        device: to draw on.

    Raises:
        InputError: the directory holds something, or a class gets no picture.
    """
    refuse_used_directory(directory)
    with write_directory_atomically(directory) as temporary:
        (temporary / "train").mkdir()
        write_pictures(lambda label: temporary / "train", count, seed, image_size, device)
        folders = [temporary / "digits" / name.replace(" ", "_") for name in DIGITS]
        for folder in folders:
            folder.mkdir(parents=True)
        write_pictures(lambda label: folders[label], held_out, HELD_OUT_SEED, image_size, device)
        empty = [folder.name for folder in folders if not any(folder.iterdir())]
        if empty:
            raise InputError(f"Among {held_out} held-out pictures there is none of {empty[0]}; ask for more.")


def write_pictures(folder_of: Callable[[int], Path], count: int, seed: int, image_size: int, device: str) -> None:
    """Write pictures 0 .. count - 1 of a seed as JPEG files, each into the folder of its label."""
    with ThreadPoolExecutor(min(count_cores(), 16)) as pool:
        for indices in torch.arange(count, device=device).split(_CHUNK):
            pictures = draw_digits(indices, seed, image_size)
            arrays = pictures.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            paths = [
                folder_of(label) / f"{index:06d}.jpg"
                for index, label in zip(indices.tolist(), pictures.labels.tolist(), strict=True)
            ]
            list(pool.map(_save, arrays, paths))  # raises what a thread raised


def _save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(prog="python -m scripts.demo.digit_images", description="Write pictures of digits.")
    parser.add_argument("directory", type=Path, help="directory to create")
    parser.add_argument("--count", type=int, default=40_000, help="unlabelled pictures (default: 40000)")
    parser.add_argument("--held-out", type=int, default=2_000, help="labelled pictures (default: 2000)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--seed", type=int, default=1, help="of the unlabelled pictures (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.held_out < len(DIGITS):
        raise InputError(
            f"--count {options.count} must be at least 1 and --held-out {options.held_out} at least {len(DIGITS)}."
        )
    if not 0 <= options.seed < HELD_OUT_SEED:
        raise InputError(f"Seed {options.seed} is out of range; give a number from 0 to {HELD_OUT_SEED - 1}.")
    export_digits(**vars(options))
    print(f"Pictures are in {options.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
