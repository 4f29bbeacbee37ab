"""The command line of the measurements; imports nothing heavy, so that --help answers at once."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sf_mllm.bench.choices import (
    CHAT_MODES,
    DEFAULT_CHATS,
    DEFAULT_TOWERS,
    MODES,
    PRECISIONS,
    RANDOM_CHATS,
    TOWER_FORMS,
)
from sf_mllm.bench.sizes import ImageSize, parse_size
from sf_mllm.errors import CommandLineParser, InputError, nearest

ALL = "all"
COMMANDS = {
    ALL: "a bit of each: what an image costs here, from its file to an answer (also without a command)",
    "preprocess": "image files to pixels: decoding, and each tower's preprocessing",
    "encoder": "vision towers: pixels to tokens, in several sizes, batches, precisions and modes",
    "chat": "models that answer: preprocessing, encoder, first token, further tokens, memory",
    "startup": "the chat as a process of its own: time to its help, its first word, its whole answer",
    "plot": "draw the rows of a file: latency and images/s against tokens or accuracy, and time against size",
}
_EPILOG = """\
examples:
  python -m sf_mllm.bench
  python -m sf_mllm.bench encoder sparseformer:large open_clip:ViT-L-14-336-quickgelu --batch 1 8 --rows results
  python -m sf_mllm.bench encoder --size 224 448 896 1792x224
  python -m sf_mllm.bench encoder runs/eye/encoder timm:vit_base_patch16_clip_224 --precision bfloat16 --mode compiled
  python -m sf_mllm.bench chat runs/chat/model --images /path/to/images
  python -m sf_mllm.bench plot results/throughput.csv

Models that are named together are called in turns, and ratios are to the first of them. Nothing is timed before its
output is that of the same weights in eager float32. A time is a median, with the quartiles behind it.
"""
_OWN_SIZE = "own"
ItemT = TypeVar("ItemT")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: without the program's name.

    Raises:
        InputError: a command or an option is unknown or has no usable value.
    """
    parser = CommandLineParser(
        prog="python -m sf_mllm.bench",
        description="Measure speed and memory on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    parsers = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        for name, text in COMMANDS.items()
    }
    _add_preprocess(parsers["preprocess"])
    _add_encoder(parsers["encoder"])
    _add_chat(parsers["chat"])
    _add_startup(parsers["startup"])
    _add_plot(parsers["plot"])
    for name in (ALL, "preprocess", "encoder", "chat", "startup"):
        add_common(parsers[name], name)
    asks_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
    if not asks_for_help and (not arguments or arguments[0].startswith("-")):
        arguments = [ALL, *arguments]
    if not asks_for_help and arguments[0] not in COMMANDS:
        raise InputError(
            f"Command '{arguments[0]}' is unknown.{nearest(arguments[0], COMMANDS)} Commands: {', '.join(COMMANDS)}."
        )
    return parser.parse_args(arguments)


def add_common(parser: argparse.ArgumentParser, command: str) -> None:
    """Add where and how to measure, and where rows go.

    Args:
        parser: to add to.
        command: of `COMMANDS`, that it measures as.
    """
    if command != "startup":
        parser.add_argument("--images", type=Path, metavar="FOLDER", help="your images (default: drawings are made)")
        parser.add_argument(
            "--seconds",
            type=_positive,
            default=10.0 if command != ALL else 4.0,
            help="for each model and step, after which no new round begins; five are made at least "
            "(default: %(default)g)",
        )
    parser.add_argument(
        "--repeats",
        type=_whole(1),
        default=5 if command == "startup" else 50,
        metavar="N",
        help="rounds, at most (default: %(default)s)" if command != "startup" else "default: %(default)s",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first that is there)")
    parser.add_argument("--threads", type=_whole(1), metavar="N", help="of the CPU (default: PyTorch's choice)")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FOLDER",
        help="append the results to throughput.csv there, with device and versions",
    )


def _add_preprocess(parser: argparse.ArgumentParser) -> None:
    _add_towers(parser)
    parser.add_argument(
        "--size",
        nargs="+",
        type=_size,
        default=[ImageSize(640, 480)],
        metavar="WxH",
        help="of the drawings, in pixels (default: 640x480)",
    )


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    _add_towers(parser)
    parser.add_argument(
        "--size",
        nargs="+",
        type=_size_or_own,
        default=[None],
        metavar="WxH",
        help=f"of the images: 224, 1792x224, ... or {_OWN_SIZE}, each tower's own (default: {_OWN_SIZE}); the "
        "position embedding of a ViT is resized",
    )
    add_arrangements(parser, PRECISIONS, batch=[1], precision=["float32"], mode=["eager"])


def add_arrangements(
    parser: argparse.ArgumentParser,
    precisions: Mapping[str, str],
    *,
    batch: list[int],
    precision: list[str],
    mode: list[str],
) -> None:
    """Add what towers are measured in: batches, precisions, modes.

    Args:
        parser: to add to.
        precisions: that can be chosen, of `choices.PRECISIONS`.
        batch: default.
        precision: default.
        mode: default.
    """
    parser.add_argument(
        "--batch",
        nargs="+",
        type=_whole(1),
        default=batch,
        metavar="N",
        help=f"images of a call (default: {' '.join(map(str, batch))})",
    )
    for option, choices, default in (("--precision", precisions, precision), ("--mode", MODES, mode)):
        what = "; ".join(f"{name}: {text}" for name, text in choices.items())
        parser.add_argument(
            option, nargs="+", choices=choices, default=default, help=f"{what} (default: {' '.join(default)})"
        )


def _add_towers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "towers",
        nargs="*",
        default=list(DEFAULT_TOWERS),
        metavar="TOWER",
        help=f"{TOWER_FORMS}; weights are random where none are named or none can be had "
        f"(default: {' '.join(DEFAULT_TOWERS)})",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        default=list(DEFAULT_CHATS),
        metavar="MODEL",
        help=f"demo (the shipped one), a directory, a hub id, or with random weights {', '.join(RANDOM_CHATS)} "
        f"(default: {' '.join(DEFAULT_CHATS)})",
    )
    parser.add_argument("--batch", nargs="+", type=_whole(1), default=[1], metavar="N", help="conversations of a call")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16 on cuda, else float32); the check needs room for them in float32",
    )
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=CHAT_MODES,
        default=["eager"],
        help="; ".join(f"{name}: {text}" for name, text in CHAT_MODES.items()) + " (default: eager)",
    )
    parser.add_argument("--new-tokens", type=_whole(2), default=32, metavar="N", help="of an answer (default: 32)")
    parser.add_argument("--prompt", metavar="TEXT", help="question to ask (default: a short one)")
    parser.add_argument(
        "--text-tokens", type=_whole(1), default=64, metavar="N", help="of a random model's prompt (default: 64)"
    )


def _add_startup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="as for the chat (default: the shipped one)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="to ask about (default: the shipped example)")
    parser.add_argument("--prompt", metavar="TEXT", help="question to ask (default: a short one)")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="throughput.csv that --rows has written")
    parser.add_argument("--out", type=Path, help="picture to write: .png, .svg or .pdf (default: FILE with .png)")
    parser.add_argument(
        "--accuracy",
        type=Path,
        metavar="FILE",
        help="CSV file with the columns model and accuracy, to draw against instead of tokens",
    )


def _whole(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= minimum):
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {minimum}, got '{text}'")
        return int(text)

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got '{text}'")
    return value


def _size(text: str) -> ImageSize:
    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def _size_or_own(text: str) -> ImageSize | None:
    return None if text == _OWN_SIZE else _size(text)
