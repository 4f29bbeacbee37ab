"""Our encoder beside the official SparseFormer code, the same weights in one process.

    git clone https://github.com/showlab/sparseformer DIR
    python -m eval.official_speed --checkout DIR --device cuda --rows eval/results
    python -m eval.official_speed --checkout DIR --device cpu --size base --batch 1 --precision float32 --mode eager

Protocol `encoder-speed-1`, by the machinery of `python -m sf_mllm.bench encoder`. The official model gets random
weights, which `load_official_checkpoint` gives to ours. Its tokens in eager float32 are the reference of both: ours
must equal them in eager float32 before it is timed, and errors are distances from them. Ratios are to the official
code, which is prepared as every other tower: cast, compiled as a whole, replayed as a CUDA graph.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from eval.official_model import TOLERANCES, URL, OfficialCode, OfficialTokens
from sf_mllm.bench.arguments import add_arrangements, add_common
from sf_mllm.bench.choices import MODES, PRECISIONS
from sf_mllm.bench.conditions import refuse_repeated
from sf_mllm.bench.encoder import measure_towers
from sf_mllm.bench.our_towers import make_encoder_tower, published_name
from sf_mllm.bench.rows import Row
from sf_mllm.bench.run import make_conditions, report
from sf_mllm.bench.tower import RANDOM, Tower, TowerLoader
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.quantization import QUANTIZATIONS
from sf_mllm.encoder.weights_official import load_official_checkpoint
from sf_mllm.errors import CommandLineParser, report_input_errors
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.kernels import KERNEL_NAMES, load_kernels


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is that of `python -m sf_mllm.bench`."""
    parser = CommandLineParser(
        prog="python -m eval.official_speed",
        description="Time our encoder beside the official code.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkout", type=Path, required=True, metavar="DIR", help=f"clone of {URL}")
    parser.add_argument(
        "--size",
        nargs="+",
        default=["large", "base"],
        help="base or large, those of CLIP, or another published one by its full name (default: large base)",
    )
    add_arrangements(
        parser,
        {name: text for name, text in PRECISIONS.items() if name not in QUANTIZATIONS},
        batch=[1, 256],
        precision=["bfloat16"],
        mode=list(MODES),
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=KERNEL_NAMES,
        help="that ours computes with (default: all of them on a CUDA device, else torch)",
    )
    add_common(parser, "encoder")
    options = parser.parse_args(argv)
    refuse_repeated(options.size, "Size")
    for size in options.size:
        published_name(size)
    code = OfficialCode(options.checkout)
    widest = f"sparseformer:{max(options.size, key=len)}@{max(KERNEL_NAMES, key=len)}"
    return report(lambda device: _measure(code, options, device), options, [widest])


def _measure(code: OfficialCode, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield the rows of one size after the other."""
    conditions = make_conditions(options, device)
    all_kernels = options.kernels or (KERNEL_NAMES if device.type == "cuda" else (REFERENCE,))
    for kernels in all_kernels:
        load_kernels(kernels)
    for size in options.size:
        towers = make_towers(code, size, all_kernels)
        yield from measure_towers(
            {name: _loader(tower) for name, tower in towers.items()},
            conditions,
            sizes=[None],
            batches=options.batch,
            precisions=options.precision,
            modes=options.mode,
        )


def _loader(tower: Tower) -> TowerLoader:
    return lambda _: tower


def make_towers(code: OfficialCode, size: str, all_kernels: Sequence[str]) -> dict[str, Tower]:
    """Build the official model and ours with its weights.

    Args:
        code: of the clone.
        size: as on the command line.
        all_kernels: that ours is to compute with.

    Returns:
        Towers by the names for their rows, the official one first.

    Raises:
        InputError: the code fails to build the model, or the weights are not those of a published size.
    """
    name = published_name(size)
    official = OfficialTokens(code.build(name))
    encoder = load_official_checkpoint(official.model.state_dict())
    ours = make_encoder_tower(encoder, SparseFormerImageProcessor.from_name(name), RANDOM, None)
    towers = {f"official:{size}": replace(ours, module=official, tolerances=TOLERANCES)}
    for kernels in all_kernels:
        label = f"sparseformer:{size}" + (f"@{kernels}" if kernels != REFERENCE else "")
        towers[label] = replace(ours, reference=official, kernels=kernels)
    return towers


if __name__ == "__main__":
    sys.exit(main())
