"""Where images come from when any of them can be read at any time: files of a folder, tables, bytes in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from sf_mllm.data.augment import ImageKey
from sf_mllm.data.image_io import open_image
from sf_mllm.errors import InputError

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGES_A_GROUP = 1024


class ImageSource(Protocol):
    """Numbered images."""

    fingerprint: str
    """Changes when images come, go or are exchanged; does not depend on where they lie."""

    def __len__(self) -> int:
        """Number of images, readable or not."""

    def open(self, index: int) -> Image.Image:
        """Decode an image.

        Raises:
            InputError: it cannot be decoded; the message names it.
        """

    def name(self, index: int) -> str:
        """What messages call an image; no other image of a run has this name."""


def key_of(index: int) -> ImageKey:
    """Return the key of an image of a source."""
    return ImageKey(f"{index // IMAGES_A_GROUP:06d}", index % IMAGES_A_GROUP)


def find_images(folder: str | Path) -> list[Path]:
    """List the image files of a folder and its subfolders, sorted, so that every run sees the same order.

    Raises:
        InputError: there is no such folder or it holds no image file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"Image folder '{folder}' does not exist; give a folder of images.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"Image folder '{folder}' holds no image file ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return paths


class FolderImages:
    """Image files of a folder and its subfolders."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        names = [path.relative_to(self.folder).as_posix() for path in find_images(folder)]
        self.fingerprint = digest("folder", *names)
        # One buffer instead of a million objects, whose reference counts would copy them into every worker.
        self._names = np.array([name.encode("utf-8", "surrogateescape") for name in names])

    def __len__(self) -> int:
        return len(self._names)

    def open(self, index: int) -> Image.Image:
        """Decode a file."""
        return open_image(self.name(index))

    def name(self, index: int) -> str:
        """Path of a file."""
        return str(self.folder / self._names[index].decode("utf-8", "surrogateescape"))


class TableImages:
    """Rows of a Hugging Face data set, which stays on the disk, mapped into memory.

    Args:
        table: rows with one column of {"bytes", "path"} structs, undecoded, or of bytes.
        column: its name.
        label: what messages call the table.
        fingerprint: of the table's content.
    """

    def __init__(self, table: datasets.Dataset, column: str, label: str, fingerprint: str) -> None:
        self.table, self.column, self.label, self.fingerprint = table, column, label, fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def open(self, index: int) -> Image.Image:
        """Decode a row."""
        value = self.table[int(index)][self.column]
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        source = content if content is not None else path
        if not source:
            raise InputError(f"Image {self.name(index)} is missing: column '{self.column}' is empty there.")
        return open_image(source, f"Image {self.name(index)}")

    def name(self, index: int) -> str:
        """Table and row."""
        return f"{self.label}, row {index}"


class RawImage(NamedTuple):
    """An image that is not decoded yet."""

    key: ImageKey
    name: str
    """What messages call it."""
    content: bytes | None
    """None: the place of an image holds none."""

    def open(self) -> Image.Image:
        """Decode it.

        Raises:
            InputError: it cannot be decoded.
        """
        if self.content is None:
            raise InputError(f"Image {self.name} is missing: its sample holds no image file.")
        return open_image(self.content, f"Image {self.name}")


class ImagesInMemory:
    """A few images, undecoded."""

    def __init__(self, images: Sequence[RawImage], fingerprint: str) -> None:
        self.images = images
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        """Decode an image."""
        return self.images[index].open()

    def name(self, index: int) -> str:
        """Name inside its shard."""
        return self.images[index].name


class JoinedImages:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = sources
        self.fingerprint = digest("joined", *(source.fingerprint for source in sources))
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def open(self, index: int) -> Image.Image:
        """Decode an image."""
        source, index = self._locate(index)
        return source.open(index)

    def name(self, index: int) -> str:
        """Name inside its source."""
        source, index = self._locate(index)
        return source.name(index)

    def _locate(self, index: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[number], int(index - (self._ends[number - 1] if number else 0))


def digest(*parts: Any) -> str:
    """SHA-256 of texts and numbers."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()
