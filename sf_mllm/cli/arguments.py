"""The command line of the chat; imports nothing heavy, so that --help answers at once."""

import argparse
import math
from collections.abc import Callable

from sf_mllm.constants import MAX_SEED
from sf_mllm.errors import CommandLineParser, InputError, nearest

DEFAULT_MODEL = "demo:sf_llava"

_DESCRIPTION = """\
Ask a model about an image.

With --prompt it answers once: the answer alone goes to stdout. Without, it is a conversation; /help lists its commands.
Questions and commands may also come from a pipe, one a line.
"""
_EXAMPLES = """\
examples:
  python -m sf_mllm.cli --image photo.jpg --prompt "What is in the picture?"
  python -m sf_mllm.cli --model runs/finetune/demo --image photo.jpg
  echo "What is in the picture?" | python -m sf_mllm.cli --image photo.jpg
"""


def _whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    bounds = f", at least {minimum}" if maximum is None else f" from {minimum} to {maximum}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"must be a whole number{bounds}, got '{text}'")
        return value

    return parse


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be 0 or a positive number, got '{text}'")
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Raises:
        InputError: an option is unknown or has no usable value.
    """
    parser = CommandLineParser(
        prog="python -m sf_mllm.cli",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--image", metavar="FILE", help="image to talk about")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this once, print the answer and exit")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        default=DEFAULT_MODEL,
        help="model directory, run folder or hub id (default: the small model that ships with the project)",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first that is there)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on cuda, else float32)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=_whole_number(1), default=256, help="longest answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=_temperature,
        default=0.0,
        help="0: likeliest answer (default); above: sample",
    )
    parser.add_argument("--seed", metavar="N", type=_whole_number(0, MAX_SEED), help="makes sampled answers repeatable")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="record forward passes as CUDA graphs and replay them (cuda)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile what --cuda-graphs records; first answers take longer (cuda)"
    )
    parser.add_argument("--verbose", action="store_true", help="print device, token counts and times to stderr")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [f"--{name.replace('_', '-')}" for name in vars(options)]
        guess = nearest(unknown[0].partition("=")[0], known)
        raise InputError(f"Argument '{unknown[0]}' is unknown.{guess} --help lists the options.")
    return options
