"""Zero-shot tasks: images, each with texts of which one is true; built in, or read from a user's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sf_mllm.data.augment import squeeze
from sf_mllm.data.image_io import open_image
from sf_mllm.data.image_sources import IMAGE_SUFFIXES
from sf_mllm.errors import InputError

TASKS_FILE = "tasks.jsonl"
NO_TEXT = -1
"""Stands in `ZeroShotTask.choices` behind the last text of a sample that has fewer than others."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SUBSET_SEED = 0
_READING_THREADS = 8


class TaskImages(Protocol):
    """Where the images of a task come from."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Tensor, size: int, device: torch.device) -> Tensor:
        """Return the images with the given indices, [B, 3, size, size], uint8, on a device."""
        ...


@dataclass
class ZeroShotTask:
    """S samples of one task."""

    name: str
    images: TaskImages  # S images
    texts: list[str]  # T different candidates
    choices: Tensor  # [S, C] indices into `texts`: the candidates of each sample, NO_TEXT behind the last one
    answers: Tensor  # [S] index of the true text
    are_class_names: bool = False  # the texts are names to be put into prompts, not sentences

    @classmethod
    def from_texts(
        cls, name: str, images: TaskImages, choices: Sequence[Sequence[str]], answers: Sequence[int]
    ) -> ZeroShotTask:
        """Number the texts of samples.

        Args:
            name: of the task.
            images: one a sample.
            choices: the candidates of each sample.
            answers: place of the true text among the candidates of each sample.
        """
        number_of = {text: number for number, text in enumerate(dict.fromkeys(chain.from_iterable(choices)))}
        rows = [torch.tensor([number_of[text] for text in row]) for row in choices]
        return cls(
            name=name,
            images=images,
            texts=list(number_of),
            choices=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_TEXT),
            answers=torch.stack([row[answer] for row, answer in zip(rows, answers, strict=True)]),
        )

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing."""
        return (1 / (self.choices != NO_TEXT).sum(dim=1)).double().mean().item()


class ImageFileList:
    """Whole images of files, squeezed into a square as the saved image processor does it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, indices: Tensor, size: int, device: torch.device) -> Tensor:
        """See `TaskImages`; several threads decode.

        Raises:
            InputError: a file cannot be decoded.
        """
        with ThreadPoolExecutor(_READING_THREADS) as pool:
            images = pool.map(lambda index: squeeze(open_image(self.paths[index]), (size, size)), indices.tolist())
            return torch.stack(list(images)).to(device)


def read_task_folder(folder: str | Path, samples: int) -> list[ZeroShotTask]:
    """Read the tasks of a user's folder.

    Args:
        folder: either holds `tasks.jsonl`, one JSON object a line,
            {"task": name, "image": path relative to the folder, "texts": candidates, "answer": place of the true one};
            or a folder of images for each class, named after it: one task, named after the folder.
        samples: most samples a task; of more, the same random ones are taken every time.

    Raises:
        InputError: the content is of neither kind; the message names the line.
    """
    folder = Path(folder)
    if (folder / TASKS_FILE).is_file():
        return _read_tasks_file(folder, samples)
    return [_read_class_folders(folder, samples)]


def _read_tasks_file(folder: Path, samples: int) -> list[ZeroShotTask]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate((folder / TASKS_FILE).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = _parse_row(line, f"Line {number} of '{folder / TASKS_FILE}'", folder)
            rows.setdefault(row["task"], []).append(row)
    if not rows:
        raise InputError(f"'{folder / TASKS_FILE}' is empty; give one JSON object a line.")
    tasks = []
    for name, of_task in rows.items():
        some = [of_task[index] for index in _choose(len(of_task), samples)]
        images = ImageFileList([folder / row["image"] for row in some])
        tasks.append(
            ZeroShotTask.from_texts(name, images, [row["texts"] for row in some], [row["answer"] for row in some])
        )
    return tasks


def _parse_row(line: str, place: str, folder: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}.") from error
    row = row if isinstance(row, dict) else {}
    task, image, texts, answer = (row.get(key) for key in ("task", "image", "texts", "answer"))
    if not isinstance(task, str) or not _TASK_NAME.fullmatch(task):
        raise InputError(f'{place} needs "task", a name of letters, digits, "_" and "-"; got {task!r}.')
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f'{place} needs "texts", a list of at least two candidates; got {texts!r}.')
    if len(set(texts)) < len(texts):
        raise InputError(f'{place} holds a candidate twice in "texts": {texts!r}.')
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise InputError(f'{place} needs "answer", a whole number from 0 to {len(texts) - 1}; got {answer!r}.')
    if not isinstance(image, str) or not (folder / image).is_file():
        raise InputError(f"{place} needs \"image\", a file relative to '{folder}'; got {image!r}.")
    return row


def _read_class_folders(folder: Path, samples: int) -> ZeroShotTask:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        (path, answer)
        for answer, directory in enumerate(classes)
        for path in sorted(directory.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    ]
    without = sorted({path.name for path in classes} - {classes[answer].name for _, answer in files})
    if len(classes) < 2 or without:
        raise InputError(
            f"'{folder}' holds {f'no image in {without[0]}' if without else f'{len(classes)} folders'}; give "
            f"{TASKS_FILE}, or at least two folders that are named after classes and hold images."
        )
    some = [files[index] for index in _choose(len(files), samples)]
    return ZeroShotTask(
        name=re.sub(r"[^A-Za-z0-9-]+", "_", folder.resolve().name).strip("_-") or "classes",
        images=ImageFileList([path for path, _ in some]),
        texts=[path.name for path in classes],
        choices=torch.arange(len(classes)).expand(len(some), -1),
        answers=torch.tensor([answer for _, answer in some]),
        are_class_names=True,
    )


def _choose(available: int, wanted: int) -> list[int]:
    """Indices of all samples, or of as many as are wanted, in order."""
    chosen = np.random.default_rng(_SUBSET_SEED).permutation(available)[:wanted]
    return sorted(chosen.tolist())
