"""Rows of JSON files: a list of rows (.json) or one row a line (.jsonl); only their places in the file are kept."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sf_mllm.data.image_sources import digest
from sf_mllm.data.messages import Conversation, parse_conversation
from sf_mllm.errors import InputError

LIST_SUFFIXES = (".json",)
LINES_SUFFIXES = (".jsonl", ".ndjson")
_BLOCK = 1 << 20  # bytes read at once
_SPACE = " \t\r\n"


class FileConversations:
    """Rows of a JSON list or of JSON lines.

    Opening reads the file once, for the places of its rows and its hash. A row is read from the disk, or rather from
    the system's cache of it, which all processes share.

    Args:
        path: the file; its suffix says which of the two it is.
        image_root: folder that image names are relative to; the folder of the file if None.

    Raises:
        InputError: the file is missing, empty, no UTF-8, or its list is no valid JSON.
    """

    licence: str | None = None

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.label = str(path)
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self._is_lines = self.path.suffix.lower() in LINES_SUFFIXES
        sha = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                items = _find_lines(file, sha) if self._is_lines else _ListScanner(file, sha).find_items()
                # [rows, 3]: first byte, the byte behind the last, and the number that messages give the row
                self._places = np.fromiter(items, dtype=np.dtype((np.int64, 3)))
        except (ValueError, RecursionError) as error:
            hint = "" if self._is_lines else "; name it .jsonl if it has one row a line"
            raise InputError(
                f"Instruction file '{path}' is not valid JSON ({_reason(error)}); repair it{hint}."
            ) from error
        except OSError as error:
            raise InputError(
                f"Instruction file '{path}' cannot be read ({error.strerror}); give the path of a JSON or JSONL file."
            ) from error
        if not len(self._places):
            raise InputError(f"Instruction file '{path}' holds no rows; give a file with at least one.")
        self.fingerprint = digest("file", sha.hexdigest())

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Conversation:
        """Parse a row."""
        start, end, _ = self._places[index].tolist()
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not valid JSON ({_reason(error)})") from error
        return parse_conversation(row, number=index, image_root=self.image_root)

    def place(self, index: int) -> str:
        """Row or line of the file."""
        return f"{'line' if self._is_lines else 'row'} {self._places[index, 2]} of '{self.label}'"


def _find_lines(file: BinaryIO, sha: Any) -> Iterator[tuple[int, int, int]]:
    """Yield the places of lines that hold something, numbered from 1."""
    start = 0
    for number, line in enumerate(file, start=1):
        sha.update(line)
        skipped = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        end = start + len(line)
        if number == 1 and line[skipped:].lstrip().startswith(b"["):
            raise ValueError("it starts with a list, but a .jsonl file has one row a line; name it .json")
        if line[skipped:].strip():
            yield start + skipped, end, number
        start = end


class _ListScanner:
    """Finds the items of a JSON list in a file without keeping either in memory: the text is a moving window."""

    def __init__(self, file: BinaryIO, sha: Any) -> None:
        self._file, self._sha = file, sha
        self._to_text = codecs.getincrementaldecoder("utf-8")()
        self._to_value = json.JSONDecoder().raw_decode
        self._text = ""
        self._next = 0  # character of the window that is not consumed yet
        self._offset = 0  # byte of the file that this character starts at
        self._line = 1
        self._is_whole = False

    def find_items(self) -> Iterator[tuple[int, int, int]]:
        """Yield the places of the items, numbered from 0.

        Raises:
            ValueError: the file is not UTF-8 or not a JSON list.
        """
        self._read_on()
        if self._text.startswith("\ufeff"):
            self._consume(1)
        if self._peek() != "[":
            raise ValueError("it does not start with a list of rows")
        self._consume(1)
        number = 0
        if self._peek() != "]":
            while True:
                start = self._offset
                self._consume(self._length_of_value(number))
                yield start, self._offset, number
                number += 1
                separator = self._peek()
                if separator not in (",", "]"):
                    raise ValueError(f"a comma is missing after row {number - 1}, line {self._line}")
                if separator == "]":
                    break
                self._consume(1)
                self._peek()
        self._consume(1)
        if self._peek():
            raise ValueError(f"something follows the end of the list, line {self._line}")

    def _length_of_value(self, number: int) -> int:
        while True:
            try:
                _, end = self._to_value(self._text, self._next)
            except json.JSONDecodeError as error:
                if self._is_whole:
                    line = self._line + self._text.count("\n", self._next, error.pos)
                    raise ValueError(f"{error.msg} in row {number}, line {line}") from error
            else:
                if end < len(self._text) or self._is_whole:  # else a number might go on
                    return end - self._next
            self._read_on()

    def _peek(self) -> str:
        """Consume white space and return the character behind it, empty at the end of the file."""
        while True:
            stop = self._next
            while stop < len(self._text) and self._text[stop] in _SPACE:
                stop += 1
            self._consume(stop - self._next)
            if stop < len(self._text) or self._is_whole:
                return self._text[stop : stop + 1]
            self._read_on()

    def _consume(self, length: int) -> None:
        taken = self._text[self._next : self._next + length]
        self._offset += len(taken) if taken.isascii() else len(taken.encode())
        self._line += taken.count("\n")
        self._next += length

    def _read_on(self) -> None:
        """Drop what is consumed and read more, twice as much each time if nothing was."""
        rest = self._text[self._next :]
        block = self._file.read(max(_BLOCK, len(rest)))
        self._sha.update(block)
        self._is_whole = not block
        self._text = rest + self._to_text.decode(block, final=self._is_whole)
        self._next = 0


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)
