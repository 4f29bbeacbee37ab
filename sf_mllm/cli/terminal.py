"""Reading lines from a person or a pipe: prompt, Ctrl-C, Ctrl-D, completion of commands and paths."""

import glob
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

from sf_mllm.errors import InputError

_PROMPT = "> "


def read_lines(interactive: bool, commands: Sequence[str]) -> Iterator[str]:
    """Yield stripped lines that are not empty, until the end of the input.

    Args:
        interactive: show a prompt, complete with the tab key, and let Ctrl-C drop the line that is being typed.
        commands: what a "/" completes to.

    Raises:
        InputError: the input is not text.
    """
    if not interactive:
        try:
            for line in sys.stdin:
                if line.strip():
                    yield line.strip()
        except UnicodeDecodeError as error:
            raise InputError(f"The piped input is not {error.encoding} text; pipe questions, one a line.") from error
        return
    _enable_completion(commands)
    while True:
        try:
            line = input(_PROMPT).strip()
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr, flush=True)
            continue
        if line:
            yield line


def parse_path(text: str) -> str:
    """Return the path that a person typed or dropped into the terminal: with quotes, escaped blanks or a tilde."""
    text = text.strip()
    if not os.path.exists(text):
        with suppress(ValueError):  # an apostrophe is no quotation
            words = shlex.split(text)
            if len(words) == 1:
                text = words[0]
    return os.path.expanduser(text)


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """Return the lines that a half-typed one may become."""
    name, separator, path = line.partition(" ")
    if not separator:
        return [f"{command} " for command in commands if command.startswith(name)] if name.startswith("/") else []
    if name not in ("/image", "/regions"):
        return []
    found = sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*"))
    return [f"{name} {entry}{os.sep if os.path.isdir(entry) else ''}" for entry in found]


def _enable_completion(commands: Sequence[str]) -> None:
    try:
        import readline
    except ImportError:  # not on every platform; input() works without
        return

    def complete(text: str, state: int) -> str | None:
        matches = completions(text, commands)
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims("")  # a path may hold blanks: the whole line is completed
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
