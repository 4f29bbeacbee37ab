"""One exception type for bad input, and how a command line reports it."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import NoReturn


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one sentence: what was given, what is allowed, what to do. Commands print it without a traceback;
    every other exception is a defect of ours and keeps its traceback.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest valid name, or an empty string if none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def is_valid_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; half of a surrogate pair cannot, and no tokenizer takes one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message without its full stop, to be quoted in a sentence of ours.

    A line that ends with a colon says nothing without the next one, which is then added.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")


class CommandLineParser(argparse.ArgumentParser):
    """Reports bad usage as every other bad input."""

    def error(self, message: str) -> NoReturn:
        """Raise an `InputError` instead of printing the usage and exiting."""
        raise InputError(f"{message[0].upper()}{message[1:]}; --help lists the options.")


def report_input_errors(command: Callable[..., int]) -> Callable[..., int]:
    """Make a command print an `InputError` as one line and return exit status 2."""

    @wraps(command)
    def wrapper(*args: object, **kwargs: object) -> int:
        try:
            return command(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapper
