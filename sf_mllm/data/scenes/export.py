"""The built-in data set: procedural scenes as an image folder with conversations in LLaVA JSON.

Exported, so that a demo goes through the same readers as a user's own data.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.errors import InputError

IMAGE_FOLDER = "images"
CONVERSATIONS_FILE = "instructions.json"
REQUEST_FILE = "scenes.json"
FORMAT_VERSION = 2
"""Raised when the same request would give other scenes or texts, so that old exports are not taken for new ones."""

_CHUNK = 32  # scenes drawn at once
IMAGE_SUFFIXES = {"bmp": ".bmp", "jpeg": ".jpg", "png": ".png"}


def export_scenes(
    directory: str | Path,
    count: int,
    seed: int = 0,
    *,
    image_size: int = 224,
    min_objects: int = 1,
    max_objects: int = 8,
    domain: str = "plain",
    turns: int = 6,
    image_format: str = "jpeg",
    workers: int = 1,
) -> Path:
    """Write scenes 0 .. count - 1 of a seed as images and question-answer conversations.

    The directory then holds `images/000000.jpg`, ..., `instructions.json` (LLaVA JSON; "image" is relative to
    `images/`, "types" names the question type of each turn) and `scenes.json`, the request. A directory that already
    holds the same request is left as it is. The directory appears under its name only when it is complete.

    Args:
        directory: to create.
        count: number of scenes, at least 1.
        seed: of the scenes and of the questions; give held-out data another seed.
        image_size: side in pixels.
        min_objects: fewest objects in a scene.
        max_objects: most objects in a scene, at most 8.
        domain: of the scenes, one of DOMAINS.
        turns: questions an image, at least 1; a scene with few objects may have fewer.
        image_format: "jpeg" (quality 95, no chroma subsampling), "png", or "bmp", which takes the most space and the
            least time to decode.
        workers: processes; 1 draws in this process.

    Returns:
        `directory` as a path.

    Raises:
        InputError: a value is out of range, or the directory holds something else.
    """
    from sf_mllm.data.scenes.sampling import ScenesConfig

    config = ScenesConfig(seed, min_objects, max_objects, image_size, domain)
    if not 1 <= count <= 10_000_000:
        raise InputError(f"{count} scenes cannot be exported; give a count from 1 to 10000000.")
    if turns < 1 or workers < 1:
        raise InputError(f"turns={turns} and workers={workers} must both be at least 1.")
    if image_format not in IMAGE_SUFFIXES:
        raise InputError(f"Image format '{image_format}' is not supported; choose one of: {', '.join(IMAGE_SUFFIXES)}.")
    request = {
        "version": FORMAT_VERSION,
        "count": count,
        "seed": seed,
        "image_size": image_size,
        "min_objects": min_objects,
        "max_objects": max_objects,
        "domain": domain,
        "turns": turns,
        "image_format": image_format,
    }
    directory = Path(directory)
    if _holds_request(directory, request):
        return directory

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial_directory = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        (partial_directory / IMAGE_FOLDER).mkdir()
        draw = partial(_export_chunk, partial_directory / IMAGE_FOLDER, config, turns, image_format)
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        if workers == 1:
            rows = [row for chunk in chunks for row in draw(chunk)]
        else:  # spawn: forking a process that has started torch's threads can hang
            with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_use_one_thread) as pool:
                rows = [row for chunk_rows in pool.map(draw, chunks) for row in chunk_rows]
        (partial_directory / CONVERSATIONS_FILE).write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (partial_directory / REQUEST_FILE).write_text(json.dumps(request, indent=1), encoding="utf-8")
        partial_directory.chmod(0o755)  # mkdtemp makes it private
        try:
            partial_directory.rename(directory)
        except OSError:  # another process may have finished the same export first
            if not _holds_request(directory, request):
                raise
    finally:
        shutil.rmtree(partial_directory, ignore_errors=True)
    return directory


def _holds_request(directory: Path, request: dict[str, Any]) -> bool:
    """Tell whether the export is already there; refuse a directory with other content."""
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise InputError(f"'{directory}' is a file; give a directory for the scenes.")
    if not any(directory.iterdir()):
        return False
    try:
        found = json.loads((directory / REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"'{directory}' is not empty and holds no exported scenes; give a new directory.")
    found = {"domain": "plain"} | found  # exports from before there were others do not name it
    differing = sorted(key for key in request if found.get(key) != request[key])
    if differing:
        raise InputError(
            f"'{directory}' holds scenes of another request (different: {', '.join(differing)}); "
            "delete it or give another directory."
        )
    return True


def _export_chunk(
    image_folder: Path, config: Any, turns: int, image_format: str, indices: Sequence[int]
) -> list[dict[str, Any]]:
    """Write the images of some scenes and return their LLaVA rows."""
    import torch
    from PIL import Image

    from sf_mllm.data.scenes.language import objects_of
    from sf_mllm.data.scenes.questions import ask_questions
    from sf_mllm.data.scenes.render import render
    from sf_mllm.data.scenes.sampling import sample_scenes

    scenes = sample_scenes(torch.tensor(list(indices)), config)
    pixels = render(scenes, config.image_size).permute(0, 2, 3, 1).contiguous().numpy()
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if image_format == "jpeg" else {}
    rows = []
    for index, objects, image in zip(indices, objects_of(scenes), pixels, strict=True):
        name = f"{index:06d}{IMAGE_SUFFIXES[image_format]}"
        Image.fromarray(image).save(image_folder / name, **options)
        questions = ask_questions(objects, question_rng(config.seed, index), turns)
        conversations = []
        for turn, item in enumerate(questions):
            prefix = f"{IMAGE_TOKEN}\n" if turn == 0 else ""
            conversations.append({"from": "human", "value": prefix + item.question})
            conversations.append({"from": "gpt", "value": item.answer})
        rows.append(
            {
                "id": f"scene-{config.seed}-{index:06d}",
                "image": name,
                "conversations": conversations,
                "types": [item.type for item in questions],
            }
        )
    return rows


def question_rng(seed: int, index: int) -> random.Random:
    """Return the generator that decides the questions about one scene, independent of all other scenes."""
    return random.Random(f"scene questions {seed} {index}")


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
