"""Zero-shot tasks on held-out scenes: each sample is a scene and texts of which exactly one is true.

"swap", "position" and "relation" need colours, shapes and places to be bound to objects; a bag of words stays at chance
there.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_mllm.data.scene_language import RELATIONS, SceneObject, objects_of, ordered_pairs, relations_between
from sf_mllm.data.scene_render import render
from sf_mllm.data.scene_sampling import (
    COLORS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    Scenes,
    ScenesConfig,
    concatenate,
    sample_scenes,
)
from sf_mllm.data.zero_shot_tasks import ZeroShotTask
from sf_mllm.errors import InputError

HELD_OUT_SEED = 4_000_000_001
"""Seed of the evaluation scenes; nothing is trained on it."""

_Item = tuple[list[str], int]
_Builder = Callable[[Sequence[SceneObject], random.Random], _Item | None]
_Builders = dict[str, tuple[_Builder, int, int]]
_INDICES_PER_TASK = 1_000_000
_CHUNK = 256


class TaskSet(NamedTuple):
    """Tasks by name, in their order, and what scenes they are about."""

    builders: _Builders
    scenes: dict[str, Any] = {}  # fields of ScenesConfig, besides seed and numbers of objects


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
        if builder is _caption:
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


def _collect(
    start: int, name: str, samples: int, config: ScenesConfig, builder: _Builder
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


def _shuffled(right: str, wrong: Sequence[str], rng: random.Random) -> _Item:
    """Put the true text at a random place: a model that finds all texts equal must score at chance."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return choices, choices.index(right)


def _named(item: SceneObject) -> str:
    return f"{item.color} {item.shape}"


def _unique(objects: Sequence[SceneObject], rng: random.Random) -> list[SceneObject]:
    """Objects whose colour and shape together fit no other object, in random order."""
    counts = Counter(_named(item) for item in objects)
    return [item for item in rng.sample(list(objects), len(objects)) if counts[_named(item)] == 1]


def _ask_color(objects: Sequence[SceneObject], rng: random.Random) -> _Item:
    return [f"{color} object" for color in COLORS], COLORS.index(objects[0].color)


def _ask_shape(objects: Sequence[SceneObject], rng: random.Random) -> _Item:
    return list(SHAPES), SHAPES.index(objects[0].shape)


def _ask_size(objects: Sequence[SceneObject], rng: random.Random) -> _Item:
    return [f"{size} object" for size in SIZES], SIZES.index(objects[0].size)


def _ask_count(objects: Sequence[SceneObject], rng: random.Random) -> _Item:
    texts = ["1 object"] + [f"{number} objects" for number in range(2, MAX_OBJECTS + 1)]
    return texts, len(objects) - 1


def _ask_one_attribute(objects: Sequence[SceneObject], rng: random.Random) -> _Item | None:
    attribute, values = rng.choice((("color", COLORS), ("shape", SHAPES)))
    present = {(item.color, item.shape) for item in objects}
    for item in rng.sample(list(objects), len(objects)):
        variants = [
            item._replace(color=value) if attribute == "color" else item._replace(shape=value) for value in values
        ]
        if sum((variant.color, variant.shape) in present for variant in variants) == 1:
            return [_named(variant) for variant in variants], values.index(getattr(item, attribute))
    return None


def _ask_swap(objects: Sequence[SceneObject], rng: random.Random) -> _Item | None:
    present = {(item.color, item.shape) for item in objects}
    for a, b in ordered_pairs(objects, rng):
        if not {(a.color, b.shape), (b.color, a.shape)} & present:
            right = f"{_named(a)} {_named(b)}"
            return _shuffled(right, [f"{b.color} {a.shape} {a.color} {b.shape}"], rng)
    return None


def _ask_position(objects: Sequence[SceneObject], rng: random.Random) -> _Item | None:
    for item in _unique(objects, rng):
        return [f"{_named(item)} {place}" for place in PLACES], PLACES.index(item.place)
    return None


def _ask_relation(objects: Sequence[SceneObject], rng: random.Random) -> _Item | None:
    for a, b in ordered_pairs(_unique(objects, rng), rng):
        relations = relations_between(a, b)
        if relations:
            relation = rng.choice(relations)
            opposite = RELATIONS[RELATIONS.index(relation) ^ 1]
            return _shuffled(f"{_named(a)} {relation} {_named(b)}", [f"{_named(a)} {opposite} {_named(b)}"], rng)
    return None


def _caption(objects: Sequence[SceneObject], rng: random.Random) -> _Item:
    """The full caption of `sf_mllm.data.scene_captions` in words; `build_tasks` adds the other samples' captions."""
    number = f"{len(objects)} object{'s' if len(objects) > 1 else ''}"
    phrases = [f"{item.size} {_named(item)} {item.place}" for item in objects]
    if len(objects) == MAX_OBJECTS:
        phrases = [f"{_named(item)} {item.place}" for item in objects]
    return [" ".join((number, *phrases))], 0


_SCENES: _Builders = {  # builder, fewest and most objects
    "color": (_ask_color, 1, 1),
    "shape": (_ask_shape, 1, 1),
    "size": (_ask_size, 1, 1),
    "count": (_ask_count, 1, MAX_OBJECTS),
    "one_attribute": (_ask_one_attribute, 2, MAX_OBJECTS),
    "swap": (_ask_swap, 2, MAX_OBJECTS),
    "position": (_ask_position, 1, MAX_OBJECTS),
    "relation": (_ask_relation, 2, MAX_OBJECTS),
    "retrieval": (_caption, 1, MAX_OBJECTS),
}

TASK_SETS = {"scenes": TaskSet(_SCENES)}
"""The built-in sets of tasks, by the name that `evaluation.zero_shot` of a run takes."""
