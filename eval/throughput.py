"""The tables of speed: `python -m sf_mllm.bench` with the arguments that the published rows were measured with.

    python -m eval.throughput gpu gpu-compiled gpu-size gpu-chat --rows eval/results
    python -m eval.throughput cpu cpu-size cpu-preprocess cpu-chat startup --rows eval/results

Each table is one command line of the package's own benchmark, whose protocols its modules describe; with --rows its
rows go to throughput.csv.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sf_mllm.bench.__main__ import main as run_bench
from sf_mllm.errors import CommandLineParser, report_input_errors

_BASE = ("sparseformer:base", "open_clip:ViT-B-16-quickgelu", "timm:vit_base_patch16_clip_quickgelu_224")
_LARGE = ("sparseformer:large", "open_clip:ViT-L-14-quickgelu", "timm:vit_large_patch14_clip_quickgelu_224")
_LLAVA = ("open_clip:ViT-L-14-336-quickgelu", "timm:vit_large_patch14_clip_quickgelu_336")  # LLaVA-1.5's, 576 tokens
_SIZES = ("--size", "224", "448", "896", "1792", "1792x224", "224x1792")
_GPU, _CPU = ("--device", "cuda"), ("--device", "cpu", "--threads", "2")

TABLES: dict[str, tuple[str, ...]] = {
    "gpu": (
        *("encoder", *_LARGE, *_LLAVA, *_BASE, *_GPU, "--batch", "1", "32", "256"),
        *("--precision", "bfloat16", "bfloat16-autocast"),
    ),
    "gpu-compiled": (
        *("encoder", *_LARGE[::2], f"{_LARGE[0]}@triton", _LLAVA[1], *_BASE[::2], f"{_BASE[0]}@triton", *_GPU),
        *("--batch", "1", "256"),
        *("--precision", "bfloat16", "--mode", "compiled", "cuda-graphs"),
    ),
    "gpu-size": (
        *("encoder", *_LARGE[::2], f"{_LARGE[0]}@triton", *_GPU, *_SIZES, "--batch", "8"),
        *("--precision", "bfloat16", "--mode", "eager", "cuda-graphs"),
    ),
    "gpu-chat": (
        *("chat", "random:sparseformer-7b", "random:llava-1.5-7b", *_GPU),
        *("--batch", "1", "16", "--new-tokens", "32", "--mode", "eager", "compiled-cuda-graphs"),
    ),
    "cpu": ("encoder", *_BASE, *_LARGE, *_LLAVA, *_CPU),
    "cpu-size": ("encoder", *_BASE[::2], *_CPU, *_SIZES),
    "cpu-preprocess": ("preprocess", *_BASE[:2], _LLAVA[0], *_CPU, "--size", "640x480", "1920x1080", "4000x3000"),
    "cpu-chat": ("chat", "demo", *_CPU),
    "startup": ("startup", *_CPU, "--repeats", "10"),
}
"""Arguments of the benchmark by the name of the table; ratios within a table are to its first model."""


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is the worst of the tables'."""
    parser = CommandLineParser(prog="python -m eval.throughput", description="Measure the tables of speed.")
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", type=Path, help="folder whose throughput.csv the results are appended to")
    options = parser.parse_args(argv)
    statuses = []
    for table in options.tables:
        arguments = [*TABLES[table], *(() if options.rows is None else ("--rows", str(options.rows)))]
        print(f"{table}: python -m sf_mllm.bench {' '.join(arguments)}", flush=True)
        statuses.append(run_bench(arguments))
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
