"""Conversations about images: the typed form used everywhere, and the strict parser of a row of any source."""

import os.path
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.data.image_io import open_image
from sf_mllm.errors import InputError, is_valid_text

_ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_IMAGE_PART = IMAGE_TOKEN + "\n"
"""An image part as text; the chat templates of this project write it in the same way (`data.chat`)."""


@dataclass(frozen=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant"; images are `<image>` placeholders inside `text`."""

    role: str
    text: str


class ImageReference(ABC):
    """An image that is not read yet; `str()` is what messages call it."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is something to decode; nothing is read."""

    @abstractmethod
    def open(self) -> Image.Image:
        """Decode it.

        Raises:
            InputError: it is missing or damaged; the message names it.
        """


@dataclass(frozen=True)
class ImageFile(ImageReference):
    """An image file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.path)  # Path.is_file raises where a name is too long to exist

    def open(self) -> Image.Image:
        """Decode the file."""
        return open_image(self.path)


@dataclass(frozen=True)
class Conversation:
    """One row of training data: user and assistant take turns, the assistant speaks last.

    `images` holds one image per `<image>` placeholder, in the order of the placeholders.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageReference, ...] = ()


def parse_conversation(row: Any, *, number: int, image_root: Path) -> Conversation:
    r"""Turn a row into a conversation; whether its images exist is not looked up.

    Two forms are known, and `image` and `images` mean the same in both, one image or a list of them::

        {"id": "7", "image": "7.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]}
        {"id": "7", "images": ["7.jpg"], "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A dog."}]}

    `<image>` may stand anywhere in a human turn; a row without images is text only. Content is a text or a list of
    parts; an image part may hold the file's name as `image` or `path` if the row has no `images`. Answers are stripped
    of surrounding white space, as chat templates do.

    Args:
        row: a decoded row; its images are file names or `ImageReference`s.
        number: the row's id if it has none.
        image_root: folder that file names are relative to.

    Raises:
        InputError: the row is malformed; the message says how, not where.
    """
    if not isinstance(row, dict):
        raise InputError(f"is a JSON {type(row).__name__}, not an object")
    forms = [form for form in ("conversations", "messages") if row.get(form)]
    if len(forms) != 1 or not isinstance(row[forms[0]], list):
        raise InputError("needs a non-empty list of turns under either 'conversations' or 'messages'")
    form = forms[0]
    parse_turn = _parse_llava_turn if form == "conversations" else _parse_chat_turn
    inside: list[str] = []  # names of images that stand in the turns themselves
    messages = tuple(_checked(*parse_turn(turn, position, inside), position) for position, turn in enumerate(row[form]))

    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        names = {"user": "human", "assistant": "gpt"} if form == "conversations" else {}
        first, second = names.get("user", "user"), names.get("assistant", "assistant")
        raise InputError(
            f"turns must alternate {first}, {second} and end with {second}, but they are "
            f"{', '.join(names.get(role, role) for role in roles)}"
        )

    images = _collect_images(row, inside)
    placeholders = sum(message.text.count(IMAGE_TOKEN) for message in messages)
    if placeholders != len(images):
        raise InputError(f"has {len(images)} image(s) but its turns hold {placeholders} {IMAGE_TOKEN} placeholder(s)")
    return Conversation(
        id=str(number if row.get("id") is None else row["id"]),
        messages=messages,
        images=tuple(ImageFile(image_root / image) if isinstance(image, str) else image for image in images),
    )


def _parse_llava_turn(turn: Any, position: int, inside: list[str]) -> tuple[str, str]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLE_OF or not isinstance(value, str):
        raise InputError(f"turn {position} needs 'from' (one of {', '.join(_ROLE_OF)}) and a text 'value'")
    return speaker, value


def _parse_chat_turn(turn: Any, position: int, inside: list[str]) -> tuple[str, str]:
    speaker = turn.get("role") if isinstance(turn, dict) else None
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLE_OF or not isinstance(content, str | list):
        raise InputError(f"turn {position} needs 'role' (one of user, assistant, system) and 'content', text or parts")
    if isinstance(content, str):
        return speaker, content
    return speaker, "".join(_parse_part(part, position, inside) for part in content)


def _parse_part(part: Any, position: int, inside: list[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind != "image":
        raise InputError(f"turn {position} has a part that is neither {{type: image}} nor {{type: text, text: WORDS}}")
    name = part.get("image") or part.get("path")
    if name is not None and not isinstance(name, str):
        raise InputError(f"turn {position} holds an image that is no file name; put embedded images under 'images'")
    inside.extend([name] if name else [])
    return _IMAGE_PART


def _checked(speaker: str, text: str, position: int) -> Message:
    role = _ROLE_OF[speaker]
    text = text.strip() if role == "assistant" else text
    if not text.strip():
        raise InputError(f"turn {position} ({speaker}) is empty")
    if not is_valid_text(text):
        raise InputError(f"turn {position} ({speaker}) holds half a character, an unpaired surrogate")
    if role != "user" and IMAGE_TOKEN in text:
        raise InputError(f"turn {position} ({speaker}) holds {IMAGE_TOKEN}, which only human turns may")
    return Message(role=role, text=text)


def _collect_images(row: dict[str, Any], inside: list[str]) -> list[str | ImageReference]:
    """Return a row's images, from whichever of its three possible places holds some."""
    places: list[Any] = [row.get("image"), row.get("images"), inside]
    filled = [[place] if isinstance(place, str | ImageReference) else place for place in places if place]
    if len(filled) > 1:
        raise InputError(
            "names images in several places; use one of 'image', 'images' and the image parts of the turns"
        )
    images = filled[0] if filled else []
    if not isinstance(images, list) or not all(isinstance(image, str | ImageReference) and image for image in images):
        raise InputError("'image' must be a file name or a list of file names, and so must 'images'")
    return images
