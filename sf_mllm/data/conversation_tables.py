"""Rows of Hugging Face data sets: texts and images stay on the disk, mapped into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sf_mllm.data.image_io import open_image
from sf_mllm.data.image_sources import digest
from sf_mllm.data.messages import Conversation, ImageReference, parse_conversation
from sf_mllm.errors import InputError

if TYPE_CHECKING:
    import datasets

_TEXT_COLUMNS = ("conversations", "messages")
_IMAGE_COLUMNS = ("image", "images")
_ROWS_HASHED_AT_ONCE = 1000


@dataclass(frozen=True)
class EmbeddedImage(ImageReference):
    """An image whose bytes are in a table."""

    source: TableConversations
    row: int
    column: str
    number: int
    """Among the images of the row."""

    def __str__(self) -> str:
        return f"{self.number} in {self.source.place(self.row)}"

    def exists(self) -> bool:
        """Whether there are bytes; a row without them is given as a file's name."""
        return True

    def open(self) -> Image.Image:
        """Decode the bytes."""
        value = list(_values(self.source.table[self.row].column(self.column)[0]))[self.number]
        content = value["bytes"] if _is_struct(value) else value
        return open_image(content.as_py(), f"Image {self}")


class TableConversations:
    """Rows of a table with a column `conversations` or `messages` and, if there are images, `image` or `images`.

    Images are bytes, {"bytes", "path"} structs (what an Image column is stored as), file names, or lists of these.

    Args:
        table: the data set.
        label: what messages call it.
        image_root: folder that file names are relative to.
        sizes: what tells the table's images from others, names and sizes of its files.

    Raises:
        InputError: it has no column of conversations, or two.
    """

    def __init__(self, table: datasets.Dataset, label: str, image_root: str | Path, sizes: Sequence[str]) -> None:
        found = [name for name in _TEXT_COLUMNS if name in table.column_names]
        if len(found) != 1:
            what = "both a column" if found else "no column"
            raise InputError(
                f"'{label}' has {what} 'conversations' {'and' if found else 'or'} 'messages' "
                f"(columns: {', '.join(table.column_names)}); rename or remove columns so that it has one of them."
            )
        self.label = label
        self.licence = (table.info.license or "").strip().partition("\n")[0] or None  # some hold its whole text
        self.image_root = Path(image_root)
        self._image_columns = [name for name in _IMAGE_COLUMNS if name in table.column_names]
        kept = [name for name in ("id", *found, *self._image_columns) if name in table.column_names]
        self.table = table.select_columns(kept).with_format("arrow")
        self._texts = self.table.remove_columns(self._image_columns)
        self.fingerprint = digest("table", len(table), *sizes, _hash_texts(self._texts))

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> Conversation:
        """Parse a row; the bytes of its images are not read."""
        texts = self._texts[index].to_pylist()[0]
        images: dict[str, Any] = {name: list(self._refer_to_images(index, name)) for name in self._image_columns}
        return parse_conversation(texts | images, number=index, image_root=self.image_root)

    def place(self, index: int) -> str:
        """Row of the table."""
        return f"row {index} of '{self.label}'"

    def _refer_to_images(self, index: int, column: str) -> Iterator[ImageReference | str]:
        """Yield the images of a row: references to bytes where there are some, else file names."""
        for number, value in enumerate(_values(self.table[index].column(column)[0])):
            content = value["bytes"] if _is_struct(value) else value
            if content.is_valid and _holds_bytes(content):
                yield EmbeddedImage(self, index, column, number)
            else:
                name = value["path"] if _is_struct(value) else value
                yield name.as_py() or ""


def _values(cell: Any) -> Iterator[Any]:
    """Yield the Arrow values of a cell that holds one or a list of them; none if it is empty."""
    import pyarrow

    if cell.is_valid:
        yield from cell.values if isinstance(cell, pyarrow.ListScalar | pyarrow.LargeListScalar) else (cell,)


def _is_struct(value: Any) -> bool:
    import pyarrow

    return isinstance(value, pyarrow.StructScalar)


def _holds_bytes(value: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(value.type) or pyarrow.types.is_large_binary(value.type)


def _hash_texts(table: datasets.Dataset) -> str:
    """Hash all columns of a table, without the padding and the divisions of its files."""
    sha = hashlib.sha256()
    for part in table.iter(batch_size=_ROWS_HASHED_AT_ONCE):
        for batch in part.combine_chunks().to_batches():
            sha.update(batch.serialize())
    return sha.hexdigest()
