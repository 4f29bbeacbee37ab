"""What training would make of every row of its conversations, found out before it begins."""

import hashlib
import json
import logging
import os
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.cores import count_cores
from sf_mllm.data.chat import encode_conversation
from sf_mllm.data.conversation_sources import JoinedConversations
from sf_mllm.data.messages import Conversation
from sf_mllm.errors import InputError

logger = logging.getLogger(__name__)


class Problem(IntEnum):
    """Why a row cannot be trained on; of several reasons the first one in this order counts."""

    NONE = 0
    MALFORMED = 1
    REFUSED_BY_TEMPLATE = 2
    MISSING_IMAGE = 3
    DAMAGED_IMAGE = 4
    NO_ANSWER = 5
    CUT_IMAGE = 6

    @property
    def words(self) -> str:
        """The problem in plain words, for tables and records."""
        return _WORDS[self]


_WORDS = {
    Problem.NONE: "usable",
    Problem.MALFORMED: "malformed",
    Problem.REFUSED_BY_TEMPLATE: "refused by the chat template",
    Problem.MISSING_IMAGE: "missing image",
    Problem.DAMAGED_IMAGE: "damaged image",
    Problem.NO_ANSWER: "no answer within max_length",
    Problem.CUT_IMAGE: "image cut off by max_length",
}
CHECK_FIELDS = np.dtype(
    [
        ("problem", np.uint8),
        ("turns", np.int32),
        ("images", np.int32),
        ("missing_images", np.int32),
        ("damaged_images", np.int32),
        ("tokens", np.int32),  # of the whole row
        ("kept_tokens", np.int32),  # within max_length
        ("answer_tokens", np.int32),
        ("kept_answer_tokens", np.int32),
        ("digest", np.uint64),  # of text and image names: rows that are the same have the same
    ]
)
_ROWS_AT_ONCE = 64
_ROWS_A_PROCESS = 2000  # fewer are checked sooner than another process starts
_DECODED_ROWS_A_PROCESS = 100
_MAX_PROCESSES = 16  # a container may see more cores than it may use
_SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class RowChecks:
    """What was found out about the rows of a source."""

    rows: np.ndarray
    """[rows] of `CHECK_FIELDS`."""
    reasons: dict[int, str]
    """A sentence for each row that cannot be used."""

    @property
    def usable(self) -> np.ndarray:
        """Which rows can be trained on, [rows]."""
        return self.rows["problem"] == Problem.NONE

    def problem_of(self, row: int) -> Problem:
        """Return why a row cannot be used."""
        return Problem(int(self.rows["problem"][row]))

    def count_problems(self) -> dict[str, int]:
        """Return how many rows have which problem, in words."""
        counts = Counter(self.rows["problem"].tolist())
        return {problem.words: counts[problem] for problem in Problem if problem and counts[problem]}

    def save(self, path: Path, key: str) -> None:
        """Write everything to an .npz file, atomically."""
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        text = json.dumps({"key": key, "reasons": self.reasons}).encode()
        np.savez(temporary, rows=self.rows, text=np.frombuffer(text, dtype=np.uint8))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, key: str) -> "RowChecks | None":
        """Read what `save` wrote; None if there is nothing, or it belongs to other data or settings."""
        try:
            with np.load(path) as arrays:
                rows, text = arrays["rows"], json.loads(arrays["text"].tobytes())
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        if text["key"] != key or rows.dtype != CHECK_FIELDS:
            return None
        return cls(rows, {int(row): reason for row, reason in text["reasons"].items()})


def check_rows(
    source: JoinedConversations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_seq_length: int,
    max_length: int,
    decode_images: bool,
) -> RowChecks:
    """Parse and tokenise every row and look for its images, in several processes if there are many rows.

    Args:
        source: the rows.
        tokenizer: with `<image>` and the chat template that training uses.
        image_seq_length: visual tokens of an image.
        max_length: tokens that are kept of a row.
        decode_images: decode every image, which finds damaged ones; else only their existence is checked.
    """
    checker = _RowChecker(source, tokenizer, image_seq_length, max_length, decode_images)
    processes = _count_processes(len(source), decode_images)
    loader = DataLoader(checker, batch_size=1, num_workers=processes, collate_fn=itemgetter(0))
    rows = np.zeros(len(source), dtype=CHECK_FIELDS)
    reasons: dict[int, str] = {}
    done, began = 0, time.monotonic()
    next_line = began + _SECONDS_BETWEEN_LINES
    for part, part_reasons in loader:
        rows[done : done + len(part)] = part
        reasons |= part_reasons
        done += len(part)
        now = time.monotonic()
        if now >= next_line and done < len(source):
            left = (now - began) / done * (len(source) - done)
            logger.info("%d of %d conversations checked, about %.0f s left", done, len(source), left)
            next_line = now + _SECONDS_BETWEEN_LINES
    return RowChecks(rows, reasons)


class _RowChecker(Dataset):
    """Checks of the rows, some of them at a time."""

    def __init__(
        self,
        source: JoinedConversations,
        tokenizer: PreTrainedTokenizerBase,
        image_seq_length: int,
        max_length: int,
        decode_images: bool,
    ) -> None:
        self.source = source
        self.encode = partial(encode_conversation, tokenizer, image_seq_length=image_seq_length)
        self.image_token_id: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_seq_length = image_seq_length
        self.max_length = max_length
        self.decode_images = decode_images
        self.sound_images: set[int] = set()  # hashes of images that were decoded; one often stands in several rows

    def __len__(self) -> int:
        return -(-len(self.source) // _ROWS_AT_ONCE)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[int, str]]:
        numbers = range(index * _ROWS_AT_ONCE, min((index + 1) * _ROWS_AT_ONCE, len(self.source)))
        rows = np.zeros(len(numbers), dtype=CHECK_FIELDS)
        reasons = {}
        for row, number in zip(rows, numbers, strict=True):
            problem, reason = self._check(row, number)
            row["problem"] = problem
            if problem:
                reasons[number] = " ".join(reason.split())  # one line, whatever names stand in it
        return rows, reasons

    def _check(self, row: np.void, number: int) -> tuple[Problem, str]:
        """Fill in what is known about a row; return its first problem and a sentence about it."""
        try:
            conversation = self.source.read(number)
        except InputError as error:
            return Problem.MALFORMED, str(error)
        row["digest"] = _digest(conversation)
        row["turns"] = len(conversation.messages)
        row["images"] = len(conversation.images)
        missing = [image for image in conversation.images if not image.exists()]
        damages = self._find_damages(conversation)
        row["missing_images"], row["damaged_images"] = len(missing), len(damages)
        try:
            whole = self.encode(conversation.messages)
        except InputError as error:
            return Problem.REFUSED_BY_TEMPLATE, str(error)
        kept = whole.truncated(self.max_length)
        row["tokens"], row["kept_tokens"] = len(whole.input_ids), len(kept.input_ids)
        row["answer_tokens"], row["kept_answer_tokens"] = whole.num_supervised, kept.num_supervised
        if missing:
            return Problem.MISSING_IMAGE, f"its image '{missing[0]}' does not exist"
        if damages:
            return Problem.DAMAGED_IMAGE, damages[0]
        cut = f"it has {len(whole.input_ids)} tokens, of which max_length={self.max_length} keeps"
        if not kept.num_supervised:
            return Problem.NO_ANSWER, f"{cut} none of an answer"
        visual_tokens = kept.input_ids.count(self.image_token_id)
        if visual_tokens != len(conversation.images) * self.image_seq_length:
            return (
                Problem.CUT_IMAGE,
                f"{cut} {visual_tokens} of its {whole.input_ids.count(self.image_token_id)} visual",
            )
        return Problem.NONE, ""

    def _find_damages(self, conversation: Conversation) -> list[str]:
        if not self.decode_images:
            return []
        damages = []
        for image in conversation.images:
            if hash(image) not in self.sound_images and image.exists():
                try:
                    image.open()
                except InputError as error:
                    damages.append(str(error))
                else:
                    self.sound_images.add(hash(image))
        return damages


def _digest(conversation: Conversation) -> int:
    parts = [part for message in conversation.messages for part in (message.role, message.text)]
    text = "\0".join([*parts, *map(str, conversation.images)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _count_processes(num_rows: int, decode_images: bool) -> int:
    """Return how many processes check rows: 0 is this one alone."""
    wanted = num_rows // (_DECODED_ROWS_A_PROCESS if decode_images else _ROWS_A_PROCESS)
    processes = min(count_cores(), _MAX_PROCESSES, wanted)
    return processes if processes > 1 else 0
