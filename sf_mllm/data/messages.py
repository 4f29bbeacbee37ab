"""Conversations about images: the typed form used everywhere, and a strict reader of LLaVA JSON."""

import json
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.errors import InputError, is_valid_text

_ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"; images are `<image>` placeholders inside `text`."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One row of training data: user and assistant take turns, the assistant speaks last.

    `image_paths` holds one file per `<image>` placeholder, in the order of the placeholders.
    """

    id: str
    messages: tuple[Message, ...]
    image_paths: tuple[Path, ...] = ()


def read_llava_json(path: str | Path, image_root: str | Path | None = None) -> list[Conversation]:
    r"""Read a LLaVA instruction file: a JSON list of rows with `conversations` and, optionally, `image`.

    A row looks like `{"id": "7", "image": "7.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is
    this?"}, {"from": "gpt", "value": "A dog."}]}`. `image` may be a list; `<image>` may stand anywhere in a human turn;
    a row without images is text only. Answers are stripped of surrounding white space, as chat templates do.

    Args:
        path: the JSON file.
        image_root: folder that image paths are relative to; the folder of the file if None.

    Returns:
        One conversation a row, in file order; every image file exists.

    Raises:
        InputError: the file cannot be read as such a list, or any row is malformed (the message counts the bad rows and
            names the first ones with the reason).
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    rows = _read_rows(path)
    conversations, problems = [], []
    for index, row in enumerate(rows):
        name = f"row {index} (id '{row['id']}')" if isinstance(row, dict) and "id" in row else f"row {index}"
        try:
            conversations.append(_parse_row(row, index, root))
        except InputError as error:
            problems.append(f"{name}: {error}")
    if problems:
        more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        shown = "; ".join(problems[:_SHOWN_PROBLEMS])
        raise InputError(
            f"{len(problems)} of {len(rows)} rows of '{path}' cannot be used, mend or remove them: {shown}{more}."
        )
    return conversations


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise InputError(f"Instruction file '{path}' does not exist; give the path of a JSON file in LLaVA's format.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"Instruction file '{path}' is not valid JSON ({error}).") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"Instruction file '{path}' must hold a non-empty JSON list of rows in LLaVA's format.")
    return rows


def _parse_row(row: Any, index: int, root: Path) -> Conversation:
    if not isinstance(row, dict):
        raise InputError(f"is a JSON {type(row).__name__}, not an object")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError("'conversations' must be a non-empty list of turns")
    messages = tuple(_parse_turn(turn, position) for position, turn in enumerate(turns))

    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise InputError(f"turns must alternate human, gpt and end with gpt, but they are {', '.join(roles)}")

    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError("'image' must be a file name or a list of file names")
    placeholders = sum(message.text.count(IMAGE_TOKEN) for message in messages)
    if placeholders != len(images):
        raise InputError(f"has {len(images)} image(s) but its turns hold {placeholders} {IMAGE_TOKEN} placeholder(s)")
    paths = tuple(root / image for image in images)
    for image_path in paths:
        if not os.path.isfile(image_path):  # Path.is_file raises where a name is too long to exist
            raise InputError(f"its image '{image_path}' does not exist")
    return Conversation(id=str(row.get("id", index)), messages=messages, image_paths=paths)


def _parse_turn(turn: Any, position: int) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLE_OF or not isinstance(value, str):
        raise InputError(f"turn {position} needs 'from' (one of {', '.join(_ROLE_OF)}) and a text 'value'")
    role = _ROLE_OF[speaker]
    text = value.strip() if role == "assistant" else value
    if not text.strip():
        raise InputError(f"turn {position} ({speaker}) is empty")
    if not is_valid_text(text):
        raise InputError(f"turn {position} ({speaker}) holds half a character, an unpaired surrogate")
    if role != "user" and IMAGE_TOKEN in text:
        raise InputError(f"turn {position} ({speaker}) holds {IMAGE_TOKEN}, which only human turns may")
    return Message(role=role, text=text)
