"""Zero-shot tasks on held-out scenes: each sample is a scene and texts of which exactly one is true.

"swap", "position" and "relation" need colours, shapes and places to be bound to objects; a bag of words stays at chance
there.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_mllm.data.scenes.language import SceneObject, objects_of
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, concatenate, sample_scenes
from sf_mllm.data.scenes.task_builders import CLUTTER, SCENES, Builder, Builders, caption
from sf_mllm.data.zero_shot_tasks import ZeroShotTask
from sf_mllm.errors import InputError

HELD_OUT_SEED = 4_000_000_001
"""Seed of the evaluation scenes; nothing is trained on it."""

_INDICES_PER_TASK = 1_000_000
_CHUNK = 64


class TaskSet(NamedTuple):
    """Tasks by name, in their order, and what scenes they are about."""

    builders: Builders
    scenes: dict[str, Any]  # fields of ScenesConfig, besides seed and numbers of objects


@dataclass
class SceneImages:
    """Scenes as the images of a task, drawn when they are asked for."""

    scenes: Scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def pixels(self, indices: Tensor, size: int, device: torch.device) -> Tensor:
        """See `TaskImages`."""
        return render(self.scenes.select(indices).to(device), size)


def build_tasks(samples: int = 512, seed: int = HELD_OUT_SEED, task_set: str = "scenes") -> list[ZeroShotTask]:
    """Build every task of a set with the same number of samples; the same seed gives the same samples.

    In "scenes": color, shape, size (one object, the named attribute alone), count (1-8 objects), one_attribute (an
    object among 2-8, its colour or shape among all eight), swap (colours of two objects exchanged), position (an
    object's place of nine), relation (left/right or above/below of another object), retrieval (the full caption among
    those of all samples).

    In "clutter" also: texture, shape and glyph (36 digits and letters; one object, large enough for its texture, no
    glyph, or a glyph that is not tiny), tiny_glyph, front (which of two overlapping objects lies in front);
    one_attribute may be the texture, or the glyph among all 36.

    Args:
        samples: a task.
        seed: of the scenes and of the questions about them.
        task_set: one of `TASK_SETS`.
    """
    if samples < 1:
        raise InputError(f"{samples} samples cannot be evaluated; give at least 1.")
    tasks = []
    for number, (name, (builder, min_objects, max_objects)) in enumerate(TASK_SETS[task_set].builders.items()):
        config = configure_scenes(task_set, seed=seed, min_objects=min_objects, max_objects=max_objects)
        scenes, choices, answers = _collect(number * _INDICES_PER_TASK, name, samples, config, builder)
        if builder is caption:
            captions = [texts[0] for texts in choices]
            choices, answers = [captions] * samples, list(range(samples))
        tasks.append(ZeroShotTask.from_texts(name, SceneImages(scenes), choices, answers))
    return tasks


def configure_scenes(task_set: str, **fields: Any) -> ScenesConfig:
    """Return the configuration of scenes that a set of tasks is about.

    Args:
        task_set: one of `TASK_SETS`.
        **fields: of `ScenesConfig`.
    """
    return ScenesConfig(**TASK_SETS[task_set].scenes, **fields)


def task_set_of(domain: str) -> str:
    """Return the name of the tasks about scenes of a domain, one of DOMAINS."""
    return next(name for name, task_set in TASK_SETS.items() if task_set.scenes["domain"] == domain)


def _collect(
    start: int, name: str, samples: int, config: ScenesConfig, builder: Builder
) -> tuple[Scenes, list[list[str]], list[int]]:
    """Go through scenes until enough of them allow an unambiguous sample."""
    scenes, choices, answers = [], [], []
    for index, scene, objects in _scenes_from(start, config):
        item = builder(objects, random.Random(f"zero-shot {name} {config.seed} {index}"))
        if item is not None:
            scenes.append(scene)
            choices.append(item[0])
            answers.append(item[1])
        if len(choices) == samples:
            break
    return concatenate(scenes), choices, answers


def _scenes_from(start: int, config: ScenesConfig) -> Iterator[tuple[int, Scenes, list[SceneObject]]]:
    while True:
        scenes = sample_scenes(torch.arange(start, start + _CHUNK), config)
        for offset, objects in enumerate(objects_of(scenes)):
            yield start + offset, scenes.select(slice(offset, offset + 1)), objects
        start += _CHUNK


TASK_SETS = {"scenes": TaskSet(SCENES, {"domain": "plain"}), "clutter": TaskSet(CLUTTER, {"domain": "clutter"})}
"""The built-in sets of tasks, by the name that `evaluation.zero_shot` of a run takes."""
