"""Makes a teacher store, group by group; an interruption loses the groups in work only. See `teacher_store`."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sf_mllm.config import write_text_atomically
from sf_mllm.data.augment import Crop, ImageKey
from sf_mllm.data.images import HELD_OUT
from sf_mllm.data.teacher_store import (
    DESCRIPTION_FILE,
    VERSION,
    bytes_per_crop,
    checksum,
    describe_differences,
    encode_crop,
    read_description,
)
from sf_mllm.errors import InputError, first_line

logger = logging.getLogger(__name__)


class StoreWriter:
    """Writes the groups of one store; several processes may each write some of them.

    Args:
        directory: of the store; made if missing, gone on with if an earlier start left it incomplete.
        origin: what decides the content, {what: value} in words and plain values; a run that reads the store compares
            it with its own.
        groups: names of all groups of training images, in order.

    Raises:
        InputError: the directory holds a store of another origin or layout, or something that is no store.
    """

    def __init__(
        self, directory: str | Path, origin: dict[str, Any], layout: dict[str, Any], groups: Sequence[str]
    ) -> None:
        self.directory = Path(directory)
        files = {HELD_OUT: f"{HELD_OUT}.safetensors"}
        files |= {group: f"groups/{number:06d}.safetensors" for number, group in enumerate(groups)}
        description = read_description(self.directory)
        if description is None:
            if self.directory.is_dir() and any(not path.name.startswith(".") for path in self.directory.iterdir()):
                raise InputError(
                    f"'{self.directory}' holds something that is no teacher store; name another directory."
                )
            description = {"version": VERSION, "origin": origin, "layout": layout, "groups": files}
            try:
                write_text_atomically(self.directory / DESCRIPTION_FILE, _to_json(description))
            except OSError as error:
                raise InputError(
                    f"The teacher store '{self.directory}' cannot be made: {error.strerror}; set store.path to a "
                    "writable directory."
                ) from error
        elif differences := describe_differences(description["origin"] | description["layout"], origin | layout):
            raise InputError(
                f"'{self.directory}' holds a teacher store of another kind: {differences}; name another directory."
            )
        self.description = description
        sizes = description.get("files", {})
        for name in description["groups"].values():
            path = self.directory / name
            if path.is_file() and path.stat().st_size != sizes.get(name, path.stat().st_size):
                logger.warning("%s is damaged and will be made again.", path)
                path.unlink()

    @property
    def missing(self) -> list[str]:
        """Names of the groups that are still to be written."""
        return [group for group, name in self.description["groups"].items() if not (self.directory / name).is_file()]

    def write_group(
        self,
        group: str,
        keys: Sequence[ImageKey],
        sizes: Sequence[tuple[int, int]],
        crops: Sequence[Sequence[Crop]],
        embedding: Tensor,
        patches: Tensor,
        scales: Tensor,
        *,
        num_unreadable: int,
    ) -> int:
        """Write one group, atomically; return the size of its file.

        Args:
            group: its name.
            keys: of the I images, in any order.
            sizes: (width, height) of each image.
            crops: K for each image.
            embedding: [I, K, E]; stored in fp16.
            patches: [I, K, G, G, D], int8, from `quantise`.
            scales: [I, K, G, G], fp16.
            num_unreadable: images of the group that could not be decoded.

        Raises:
            InputError: the teacher's output is not finite in fp16, or the file cannot be written.
        """
        embedding = embedding.half()
        if not (embedding.isfinite().all() and scales.isfinite().all()):
            raise InputError(
                f"The teacher's output for group '{group}' is not finite in half precision; set train.bf16=false, or "
                "check the teacher's weights."
            )
        # Sorted, so that the number of workers that made a file does not show in it.
        order = sorted(range(len(keys)), key=lambda i: keys[i])
        rows = torch.tensor([keys[i].row for i in order], dtype=torch.int64)
        index = torch.full((int(rows.max()) + 1 if len(rows) else 0,), -1)
        index[rows] = torch.arange(len(rows))
        encoded = torch.tensor([[encode_crop(sizes[i], crop) for crop in crops[i]] for i in order], dtype=torch.int64)
        tensors = {
            "crops": encoded.reshape(*embedding.shape[:2], 8),
            "embedding": embedding[order],
            "patches": patches[order],
            "scales": scales[order],
        }
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        sums = [
            [
                checksum(keys[i], number, {name: array[place, number] for name, array in arrays.items()})
                for number in range(arrays["crops"].shape[1])
            ]
            for place, i in enumerate(order)
        ]
        tensors |= {"index": index, "checksums": torch.tensor(sums, dtype=torch.int64).reshape(embedding.shape[:2])}
        target = self.directory / self.description["groups"][group]
        try:
            return self._write_file(target, tensors, {"unreadable": str(num_unreadable)})
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"'{target}' cannot be written: {first_line(error)}; make room, and the same command goes on."
            ) from error

    def _write_file(self, target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")  # the same name after a kill, so that nothing is left behind
        # One entry, since safetensors writes several in any order: equal stores are equal files.
        save_file(tensors, partial, metadata=metadata)
        partial.chmod((self.directory / DESCRIPTION_FILE).stat().st_mode)  # safetensors makes private files
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
        return target.stat().st_size

    def finish(self) -> dict[str, Any] | None:
        """Complete the store if every group is there, whichever process wrote it; otherwise do nothing.

        Returns:
            What the store holds, {"images", "crops", "unreadable_images", "grid", "bytes_per_crop", "bytes"}, or None.
        """
        if self.missing:
            return None
        sizes, images, crops, unreadable = {}, 0, 0, 0
        for name in self.description["groups"].values():
            path = self.directory / name
            sizes[name] = path.stat().st_size
            with safe_open(path, framework="np") as file:
                num_images, num_crops, embedding_size = file.get_slice("embedding").get_shape()
                grid, width = file.get_slice("patches").get_shape()[-2:]
                unreadable += int(file.metadata()["unreadable"])
            images, crops = images + num_images, crops + num_images * num_crops
        content = {
            "images": images,
            "crops": crops,
            "unreadable_images": unreadable,
            "grid": grid,
            "bytes_per_crop": bytes_per_crop(embedding_size, width, grid),
            "bytes": sum(sizes.values()),
        }
        description = {**self.description, "content": content, "files": sizes}
        write_text_atomically(self.directory / DESCRIPTION_FILE, _to_json(description))
        self.description = description
        return content


def _to_json(description: dict[str, Any]) -> str:
    return json.dumps(description, indent=2, ensure_ascii=False) + "\n"
