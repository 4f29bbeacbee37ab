"""One answer, or the conversation loop with its commands."""

import argparse
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.cli.terminal import parse_path, read_lines
from sf_mllm.data.image_io import open_image
from sf_mllm.errors import InputError, first_line, nearest

if TYPE_CHECKING:
    from sf_mllm.inference.session import ChatSession

_REGIONS_FILE = "regions.png"
COMMANDS = {
    "/image": ("PATH", "talk about this image; starts a new conversation"),
    "/regions": ("[FILE]", f"draw where the model looked (default: {_REGIONS_FILE})"),
    "/clear": ("", "forget the conversation, keep the image"),
    "/help": ("", "list the commands"),
    "/quit": ("", "leave, as Ctrl-D does"),
}


def run(options: argparse.Namespace) -> int:
    """Load image and model, then answer once or hold a conversation.

    Args:
        options: from `parse_arguments`.

    Returns:
        Exit status: 0, or 2 if input from a pipe held something unusable.

    Raises:
        InputError: the image, the model or the prompt cannot be used.
    """
    # What fails fast comes first: the image is read before torch is imported.
    image = open_image(parse_path(options.image)) if options.image is not None else None
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("The question given with --prompt is empty; ask something.")
    if options.prompt is None and sys.stdin.isatty():
        _note(f"Loading {options.model} ...")

    from transformers.utils import logging as transformers_logging

    from sf_mllm.inference.loading import choose_device, load_model
    from sf_mllm.inference.replay import Replay
    from sf_mllm.inference.session import ChatSession

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    is_recorded = options.cuda_graphs or options.compile
    if is_recorded and (device := choose_device(options.device)).type != "cuda":
        name = "--compile" if options.compile else "--cuda-graphs"
        raise InputError(f"{name} needs a CUDA device, got {device}; leave it out.")
    started = time.perf_counter()
    model, processor = load_model(options.model, options.device, options.dtype)
    if options.verbose:
        seconds = time.perf_counter() - started
        parameters = sum(parameter.numel() for parameter in model.parameters())
        _note(
            f"{options.model}: {parameters / 1e6:.1f}M parameters, {str(model.dtype).removeprefix('torch.')} on "
            f"{model.device}, loaded in {seconds:.1f} s"
        )
    if options.compile:
        _note("The model is compiled as it answers: the first two answers take longer.")
    session = ChatSession(
        model,
        processor,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        replay=Replay(model, compiled=options.compile) if is_recorded else None,
    )
    if image is not None:
        session.set_image(image)
    conversation = Conversation(session, options.verbose)
    if options.prompt is not None:
        conversation.answer(options.prompt)
        return 0
    return conversation.loop()


class Conversation:
    """Turns lines into answers and commands.

    Attributes:
        session: state of the conversation.
        verbose: whether to print the cost of each answer to stderr.
    """

    def __init__(self, session: "ChatSession", verbose: bool) -> None:
        self.session = session
        self.verbose = verbose
        self._drawn: set[str] = set()

    def loop(self) -> int:
        """Read questions and commands until the end of input or /quit.

        Returns:
            Exit status: 0, or 2 if input from a pipe held something unusable.

        Raises:
            InputError: a pipe brought nothing at all.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            hint = "Ask about the image" if self.session.image else "/image PATH gives an image to talk about"
            _note(f"{hint}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        status = None
        for line in read_lines(interactive, tuple(COMMANDS)):
            status = status or 0
            try:
                if line == "/quit":
                    break
                if line.startswith("/"):
                    self.command(line)
                else:
                    self.answer(line)
            except InputError as error:
                _note(f"error: {error}")
                status = 0 if interactive else 2
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print(flush=True)
                _note("(stopped)")
        if status is None and not interactive:
            raise InputError("There is no question: give one with --prompt, or type or pipe it in.")
        return status or 0

    def answer(self, question: str) -> None:
        """Print the answer to stdout while it is generated."""
        started = False
        with closing(self.session.ask(question)) as pieces:
            for piece in pieces:
                piece = piece if started else piece.lstrip()
                started = started or bool(piece)
                print(piece, end="", flush=True)
        print(flush=True)
        cost = self.session.statistics
        if self.verbose and cost is not None:
            _note(
                f"{cost.prompt_tokens} tokens read, {cost.new_tokens} written; first text after "
                f"{cost.seconds_to_first_text:.2f} s, all after {cost.seconds:.2f} s"
            )

    def command(self, line: str) -> None:
        """Run one /command.

        Raises:
            InputError: it is unknown, or its argument cannot be used.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            raise InputError(f"'{name}' is no command.{nearest(name, COMMANDS)} /help lists them.")
        if argument and not COMMANDS[name][0]:
            raise InputError(f"{name} takes no argument, got '{argument}'.")
        if name == "/image":
            if not argument:
                raise InputError("/image needs the path of an image, for example /image photo.jpg.")
            image = open_image(parse_path(argument))
            self.session.set_image(image)
            _note(f"Looking at {argument} ({image.width}x{image.height}); new conversation.")
        elif name == "/regions":
            self.draw_regions(parse_path(argument) if argument else _REGIONS_FILE)
        elif name == "/clear":
            self.session.clear()
            _note("Conversation forgotten.")
        else:
            for command, (parameter, text) in COMMANDS.items():
                _note(f"  {f'{command} {parameter}':<18}{text}")

    def draw_regions(self, path: str) -> None:
        """Save a picture of where the model looked.

        Raises:
            InputError: there is no image, the model has no regions, or the file cannot be written or is the user's own.
        """
        from sf_mllm.regions import draw_regions

        if path != _REGIONS_FILE and path not in self._drawn and os.path.exists(path):
            raise InputError(f"'{path}' exists already; give another name to draw the regions in.")
        rois = self.session.regions()
        assert self.session.image is not None
        picture = draw_regions(self.session.image, rois)
        try:
            picture.save(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"Regions cannot be saved as '{path}': {reason}; give a name like regions.png.") from error
        self._drawn.add(path)
        _note(f"Regions drawn in {Path(path).resolve()}")


def _note(text: str) -> None:
    """Print what is not an answer; stdout holds answers only."""
    print(text, file=sys.stderr, flush=True)
