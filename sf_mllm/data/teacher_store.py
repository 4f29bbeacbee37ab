"""A teacher store: what a teacher says about fixed crops of every image, so that later runs need not ask it again.

Layout, one directory::

    store.json                      what the store was made of and with; "files" is there once everything is written
    groups/000000.safetensors ...   one file for each group of images, numbered as in store.json

A group is a shard of a stream or 1,024 neighbours of an indexed source; the held-out images are a group of their own.
Its file holds I images with K crops each (K is 1 for held-out images, which are taken whole):

    index      [R], int64            place of each row of the group among the I images, -1 for rows without targets
    crops      [I, K, 8], int64      width and height of the image, then of the crop top, left, height, width, flip,
                                     jitter seed (-1: none), see `augment.Crop`
    embedding  [I, K, E], fp16       the teacher's image embedding
    patches    [I, K, G, G, D], int8 its normalised last patch features, see `quantised_patches`
    scales     [I, K, G, G], fp16    one a vector: patches * scales are the features
    checksums  [I, K], int64         CRC-32 of one crop's place and content

So a crop costs 2 E + G^2 (D + 2) + 72 bytes. `teacher_store_writer` makes such directories.

After: arXiv 2311.17049, the reinforced data sets of MobileCLIP, which hold embeddings; patch features are added here.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sf_mllm.data.augment import Crop, ImageKey, Resolution, cut, squeeze
from sf_mllm.errors import InputError, first_line

VERSION = 1
DESCRIPTION_FILE = "store.json"
_CHECKED_PARTS = ("crops", "embedding", "patches", "scales")
_PARTS = ("index", "checksums", *_CHECKED_PARTS)


def bytes_per_crop(embedding_size: int, width: int, grid: int) -> int:
    """Disk cost of one crop: embedding, patches with their scales, box and checksum."""
    return 2 * embedding_size + grid**2 * (width + 2) + 72


class TeacherStore:
    """Reads a complete store; open it with `TeacherStore.open`.

    Group files are mapped into memory when they are first needed, in each worker of a data loader for itself.
    """

    def __init__(self, directory: Path, description: dict[str, Any]) -> None:
        self.directory = directory
        self.description = description
        self._groups: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, directory: str | Path) -> "TeacherStore":
        """Open a store after a look at the size of each of its files.

        Raises:
            InputError: there is no store, it is of another version, not complete, or a file is missing or truncated.
        """
        directory = Path(directory)
        description = read_description(directory)
        if description is None:
            raise InputError(f"There is no teacher store in '{directory}'; {_how_to_make(directory)}.")
        if "files" not in description:
            raise InputError(
                f"The teacher store '{directory}' is not complete ({count_groups(directory, description)} of "
                f"{len(description['groups'])} groups); the command that began it goes on with it."
            )
        for name, size in description["files"].items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise InputError(
                    f"The teacher store '{directory}' is damaged: {name} {problem}; the command that made it makes the "
                    "file again and leaves the others as they are."
                )
        return cls(directory, description)

    def __str__(self) -> str:
        content = self.description["content"]
        grid = content["grid"]
        return f"{content['crops']} crops of {content['images']} images, {grid}x{grid} patch features each"

    def refuse_other_origin(self, origin: dict[str, Any]) -> None:
        """Raise unless the store was made with what a run has.

        Args:
            origin: as it was given to the writer.

        Raises:
            InputError: names the first few differences.
        """
        differences = describe_differences(self.description["origin"], origin)
        if differences:
            raise InputError(
                f"The teacher store '{self.directory}' belongs to another run: {differences}; set these as they were, "
                "or make a store for this run in another directory."
            )

    def read(self, key: ImageKey, epoch: int, image_size: tuple[int, int]) -> tuple[Crop, dict[str, Tensor]]:
        """Return one crop of an image and what the teacher says about it.

        Args:
            key: of the image.
            epoch: takes crop `epoch` modulo K.
            image_size: (width, height), to make sure that it is the image that the store was made of.

        Returns:
            The crop, and {"teacher_embedding": [E], fp16, "teacher_patches": [G, G, D], int8, "teacher_scales":
            [G, G], fp16}, which a data loader collates and
            `quantised_patches.dequantise` reads.

        Raises:
            InputError: the store has nothing of this image or another image in its place, or what it has is damaged.
        """
        tensors = self._open_group(key.group)
        place = int(tensors["index"][key.row]) if key.row < tensors["index"].get_shape()[0] else -1
        if place < 0:
            raise InputError(
                f"The teacher store '{self.directory}' has no targets of image {key.row} in group '{key.group}'; it "
                "could not be read when the store was made: make the store again, or remove the image."
            )
        crop_number = epoch % tensors["crops"].get_shape()[1]
        parts = {part: tensors[part][place, crop_number] for part in _CHECKED_PARTS}
        if int(tensors["checksums"][place, crop_number]) != checksum(key, crop_number, parts):
            name = self.description["groups"][key.group]
            raise InputError(
                f"The teacher store '{self.directory}' is damaged: the content of {name} is not what was "
                "written; delete that file, and the command that made the store makes it again."
            )
        stored_size, crop = decode_crop(parts.pop("crops"))
        if stored_size != image_size:
            before, now = ("x".join(map(str, size)) for size in (stored_size, image_size))
            raise InputError(
                f"Image {key.row} of group '{key.group}' had {before} pixels when the teacher store '{self.directory}' "
                f"was made and has {now} now; make another store of these images."
            )
        return crop, {f"teacher_{name}": torch.from_numpy(part) for name, part in parts.items()}

    def _open_group(self, group: str) -> dict[str, Any]:
        if group not in self._groups:
            name = self.description["groups"].get(group)
            if name is None:
                raise InputError(
                    f"The teacher store '{self.directory}' has no group '{group}'; it was made of other images: make "
                    "another one of these."
                )
            try:
                file = safe_open(self.directory / name, framework="np")
                self._groups[group] = {part: file.get_slice(part) for part in _PARTS}
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"The teacher store '{self.directory}' is damaged: {name} cannot be read ({first_line(error)}); "
                    "delete that file, and the command that made the store makes it again."
                ) from error
        return self._groups[group]

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when a worker is spawned."""
        return {**self.__dict__, "_groups": {}}


class StoredViews:
    """Crops as a store has them, together with what the teacher says about them.

    Args:
        store: of the images.
        color_jitter: as the crops were made with.
    """

    def __init__(self, store: TeacherStore, color_jitter: float) -> None:
        self.store = store
        self.color_jitter = color_jitter

    def cut(self, image: Image.Image, key: ImageKey, epoch: int, resolution: Resolution) -> dict[str, Tensor]:
        """Return {"pixel_values": [3, H, W], uint8} and the teacher's outputs, see `TeacherStore.read`."""
        crop, targets = self.store.read(key, epoch, image.size)
        return {"pixel_values": cut(image, crop, resolution, self.color_jitter), **targets}

    def whole(self, image: Image.Image, key: ImageKey, resolution: Resolution) -> dict[str, Tensor]:
        """Return {"pixel_values": [3, H, W], uint8}, the whole image, and the teacher's outputs."""
        return {"pixel_values": squeeze(image, resolution), **self.store.read(key, 0, image.size)[1]}


def read_description(directory: Path) -> dict[str, Any] | None:
    """Return the content of store.json, or None without that file.

    Raises:
        InputError: it is no description of this version.
    """
    path = directory / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path}' does not describe a teacher store ({first_line(error)}).") from error
    if version != VERSION:
        raise InputError(
            f"The teacher store '{directory}' has version {version}, this program reads version {VERSION}; make a new "
            "one in another directory."
        )
    return description


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the entries in which two origins differ, in words; empty when they agree."""
    # As read back from JSON, where a tuple is a list.
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    return ", ".join(
        f"{key} was {before.get(key, 'not known')}, is {now.get(key, 'not known')}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    )


def count_groups(directory: Path, description: dict[str, Any]) -> int:
    """Groups whose files are there."""
    return sum((directory / name).is_file() for name in description["groups"].values())


def checksum(key: ImageKey, crop_number: int, parts: dict[str, np.ndarray]) -> int:
    """CRC-32 of one crop's targets, and of where they belong, so that no other crop's are taken for them."""
    value = zlib.crc32(f"{key.group}\n{key.row}\n{crop_number}".encode())
    for part in _CHECKED_PARTS:
        value = zlib.crc32(parts[part].tobytes(), value)
    return value


def encode_crop(image_size: tuple[int, int], crop: Crop) -> list[int]:
    """Eight numbers for a crop of an image of (width, height)."""
    return [*image_size, *crop[:4], int(crop.flip), -1 if crop.jitter is None else crop.jitter]


def decode_crop(numbers: np.ndarray) -> tuple[tuple[int, int], Crop]:
    """Undo `encode_crop`."""
    image_width, image_height, top, left, height, width, flip, jitter = numbers.tolist()
    return (image_width, image_height), Crop(top, left, height, width, bool(flip), None if jitter < 0 else jitter)


def _how_to_make(directory: Path) -> str:
    return f"make it with python -m sf_mllm.training.reinforce CONFIG.yaml store.path={directory}"
