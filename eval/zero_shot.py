"""Zero-shot tasks on held-out scenes, for an open_clip model or for a SparseFormer in the place of its image tower.

Protocol `scenes-zero-shot-1`: every sample is one rendered scene and a list of texts, exactly one of them true; the
answer is the text with the highest cosine similarity. The tasks "swap", "position" and "relation" need colours, shapes
and places to be bound to objects; a bag of words stays at chance there. Command: `python -m eval.zero_shot --clip DIR`.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.assets import resolve_demo
from sf_mllm.errors import InputError, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

    from sf_mllm.data.scene_language import SceneObject
    from sf_mllm.data.scene_sampling import Scenes

PROTOCOL = "scenes-zero-shot-1"
HELD_OUT_SEED = 4_000_000_001
"""Seed of the evaluation scenes; nothing is trained on it."""

_Item = tuple[list[str], int]
_Builder = Callable[[Sequence["SceneObject"], random.Random], _Item | None]
_INDICES_PER_TASK = 1_000_000
_CHUNK = 256


@dataclass
class ZeroShotTask:
    """Samples of one task."""

    name: str
    scenes: "Scenes"  # B scenes
    choices: list[list[str]]  # texts of each sample; as many for every sample
    answers: list[int]  # index of the true text


@dataclass
class ZeroShotResult:
    """Score of one task."""

    task: str
    accuracy: float  # 0..1
    samples: int
    chance: float  # accuracy of guessing


def build_tasks(samples: int = 512, seed: int = HELD_OUT_SEED) -> list[ZeroShotTask]:
    """Build every task with the same number of samples; the same seed gives the same samples.

    color, shape, size (one object, the named attribute alone), count (1-8 objects), one_attribute (an object among 2-8,
    its colour or shape among all eight), swap (colours of two objects exchanged), position (an object's place of nine),
    relation (left/right or above/below of another object), retrieval (the full caption among those of all samples).
    """
    if samples < 1:
        raise InputError(f"{samples} samples cannot be evaluated; give at least 1.")
    tasks = [
        _collect(number, name, samples, seed, builder, min_objects, max_objects)
        for number, (name, (builder, min_objects, max_objects)) in enumerate(_BUILDERS.items())
    ]
    captions = [choices[0] for choices in tasks[-1].choices]
    tasks[-1].choices, tasks[-1].answers = [captions] * samples, list(range(samples))
    return tasks


def evaluate(
    tasks: Sequence[ZeroShotTask],
    encode_image: "Callable[[Tensor], Tensor]",
    encode_text: "Callable[[Tensor], Tensor]",
    tokenizer: "Callable[[list[str]], Tensor]",
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: str,
) -> list[ZeroShotResult]:
    """Score an image and a text encoder.

    Args:
        tasks: from `build_tasks`.
        encode_image: normalised pixels [B, 3, H, W] -> [B, E].
        encode_text: tokens [B, T] -> [B, E].
        tokenizer: texts -> tokens [B, T].
        image_size: side of the rendered images in pixels.
        mean: per channel, of pixels in 0..1.
        std: per channel.
        device: where both encoders live.
    """
    import torch
    import torch.nn.functional as F

    from sf_mllm.data.scene_render import render

    shift = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    results = []
    with torch.no_grad():
        for task in tasks:
            number_of = {text: number for number, text in enumerate(dict.fromkeys(chain.from_iterable(task.choices)))}
            texts = list(number_of)
            text_features = torch.cat(
                [encode_text(tokenizer(texts[i : i + _CHUNK]).to(device)) for i in range(0, len(texts), _CHUNK)]
            )
            image_features = []
            for start in range(0, len(task.scenes), _CHUNK):
                scenes = task.scenes.select(slice(start, start + _CHUNK)).to(device)
                pixels = render(scenes, image_size).float() / 255
                image_features.append(encode_image((pixels - shift) / scale))
            similarity = F.normalize(torch.cat(image_features).float()) @ F.normalize(text_features.float()).T
            numbers = torch.tensor([[number_of[text] for text in row] for row in task.choices], device=device)  # [B, C]
            predicted = numbers.gather(1, similarity.gather(1, numbers).argmax(dim=1, keepdim=True))
            answers = numbers.gather(1, torch.tensor(task.answers, device=device)[:, None])
            accuracy = (predicted == answers).double().mean().item()
            results.append(ZeroShotResult(task.name, accuracy, len(task.scenes), 1 / numbers.shape[1]))
    return results


def evaluate_directory(
    clip_directory: str | Path, encoder_directory: str | Path | None = None, *, samples: int = 512, device: str = "cpu"
) -> list[ZeroShotResult]:
    """Score an open_clip model directory, its image tower replaced by a SparseFormer if one is given.

    Args:
        clip_directory: with `open_clip_config.json`, weights and tokenizer.
        encoder_directory: of a `SparseFormerModel` with its image processor, or None for the model's own image tower.
        samples: per task.
        device: to run on.
    """
    import open_clip

    clip_directory = Path(resolve_demo(str(clip_directory)))
    if not (clip_directory / "open_clip_config.json").is_file():
        raise InputError(
            f"'{clip_directory}' holds no open_clip_config.json; give the directory of an open_clip model."
        )
    name = f"local-dir:{clip_directory}"
    clip = open_clip.create_model(name, device=device, require_pretrained=True).eval()
    preprocessing = clip.visual.preprocess_cfg
    encode_image, mean, std = clip.encode_image, preprocessing["mean"], preprocessing["std"]
    image_size = preprocessing["size"]
    if encoder_directory is not None:
        from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
        from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel

        encoder_directory = resolve_demo(str(encoder_directory))
        encoder = SparseFormerModel.from_pretrained(encoder_directory).to(device).eval()
        processor = SparseFormerImageProcessor.from_pretrained(encoder_directory)
        mean, std = processor.image_mean, processor.image_std

        def encode_image(pixels: "Tensor") -> "Tensor":
            return encoder(pixels).pooler_output

    return evaluate(
        build_tasks(samples),
        encode_image,
        clip.encode_text,
        open_clip.get_tokenizer(name),
        image_size=image_size if isinstance(image_size, int) else image_size[0],
        mean=mean,
        std=std,
        device=device,
    )


def format_results(results: Sequence[ZeroShotResult]) -> str:
    """Return one line with all accuracies in percent, chance in brackets."""
    return "  ".join(f"{item.task} {100 * item.accuracy:.1f} ({100 * item.chance:.1f})" for item in results)


def _collect(
    number: int, name: str, samples: int, seed: int, builder: _Builder, min_objects: int, max_objects: int
) -> ZeroShotTask:
    """Go through scenes until enough of them allow an unambiguous sample."""
    from sf_mllm.data.scene_sampling import concatenate

    scenes, choices, answers = [], [], []
    for index, scene, objects in _scenes_from(number * _INDICES_PER_TASK, seed, min_objects, max_objects):
        item = builder(objects, random.Random(f"zero-shot {name} {seed} {index}"))
        if item is not None:
            scenes.append(scene)
            choices.append(item[0])
            answers.append(item[1])
        if len(choices) == samples:
            break
    return ZeroShotTask(name, concatenate(scenes), choices, answers)


def _scenes_from(
    start: int, seed: int, min_objects: int, max_objects: int
) -> "Iterator[tuple[int, Scenes, list[SceneObject]]]":
    import torch

    from sf_mllm.data.scene_language import objects_of
    from sf_mllm.data.scene_sampling import ScenesConfig, sample_scenes

    config = ScenesConfig(seed=seed, min_objects=min_objects, max_objects=max_objects)
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


def _named(item: "SceneObject") -> str:
    return f"{item.color} {item.shape}"


def _unique(objects: "Sequence[SceneObject]", rng: random.Random) -> "list[SceneObject]":
    """Objects whose colour and shape together fit no other object, in random order."""
    counts = Counter(_named(item) for item in objects)
    return [item for item in rng.sample(list(objects), len(objects)) if counts[_named(item)] == 1]


def _ask_color(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item:
    from sf_mllm.data.scene_sampling import COLORS

    return [f"{color} object" for color in COLORS], COLORS.index(objects[0].color)


def _ask_shape(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item:
    from sf_mllm.data.scene_sampling import SHAPES

    return list(SHAPES), SHAPES.index(objects[0].shape)


def _ask_size(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item:
    from sf_mllm.data.scene_sampling import SIZES

    return [f"{size} object" for size in SIZES], SIZES.index(objects[0].size)


def _ask_count(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item:
    texts = ["1 object"] + [f"{number} objects" for number in range(2, 9)]
    return texts, len(objects) - 1


def _ask_one_attribute(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item | None:
    from sf_mllm.data.scene_sampling import COLORS, SHAPES

    attribute, values = rng.choice((("color", COLORS), ("shape", SHAPES)))
    present = {(item.color, item.shape) for item in objects}
    for item in rng.sample(list(objects), len(objects)):
        variants = [item._replace(**{attribute: value}) for value in values]
        if sum((variant.color, variant.shape) in present for variant in variants) == 1:
            return [_named(variant) for variant in variants], values.index(getattr(item, attribute))
    return None


def _ask_swap(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item | None:
    from sf_mllm.data.scene_language import ordered_pairs

    present = {(item.color, item.shape) for item in objects}
    for a, b in ordered_pairs(objects, rng):
        if not {(a.color, b.shape), (b.color, a.shape)} & present:
            right = f"{_named(a)} {_named(b)}"
            return _shuffled(right, [f"{b.color} {a.shape} {a.color} {b.shape}"], rng)
    return None


def _ask_position(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item | None:
    from sf_mllm.data.scene_sampling import PLACES

    for item in _unique(objects, rng):
        return [f"{_named(item)} {place}" for place in PLACES], PLACES.index(item.place)
    return None


def _ask_relation(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item | None:
    from sf_mllm.data.scene_language import RELATIONS, ordered_pairs, relations_between

    for a, b in ordered_pairs(_unique(objects, rng), rng):
        relations = relations_between(a, b)
        if relations:
            relation = rng.choice(relations)
            opposite = RELATIONS[RELATIONS.index(relation) ^ 1]
            return _shuffled(f"{_named(a)} {relation} {_named(b)}", [f"{_named(a)} {opposite} {_named(b)}"], rng)
    return None


def _caption(objects: "Sequence[SceneObject]", rng: random.Random) -> _Item:
    """The full caption of `sf_mllm.data.scene_captions` in words; `build_tasks` adds the other samples' captions."""
    number = f"{len(objects)} object{'s' if len(objects) > 1 else ''}"
    phrases = [f"{item.size} {_named(item)} {item.place}" for item in objects]
    if len(objects) == 8:
        phrases = [f"{_named(item)} {item.place}" for item in objects]
    return [" ".join((number, *phrases))], 0


_BUILDERS: dict[str, tuple[_Builder, int, int]] = {  # builder, fewest and most objects
    "color": (_ask_color, 1, 1),
    "shape": (_ask_shape, 1, 1),
    "size": (_ask_size, 1, 1),
    "count": (_ask_count, 1, 8),
    "one_attribute": (_ask_one_attribute, 2, 8),
    "swap": (_ask_swap, 2, 8),
    "position": (_ask_position, 1, 8),
    "relation": (_ask_relation, 2, 8),
    "retrieval": (_caption, 1, 8),
}


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.zero_shot", description="Zero-shot tasks on held-out scenes.")
    parser.add_argument("--clip", required=True, help="open_clip model directory, or demo:clip")
    parser.add_argument("--encoder", help="SparseFormer directory to use as the image tower")
    parser.add_argument("--samples", type=int, default=512, help="per task (default: 512)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, help="JSON lines file that the results are appended to")
    options = parser.parse_args(arguments)
    results = evaluate_directory(options.clip, options.encoder, samples=options.samples, device=options.device)
    for item in results:
        print(
            f"{item.task:14} {100 * item.accuracy:5.1f} %   chance {100 * item.chance:4.1f} %   {item.samples} samples"
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            for item in results:
                row = {"clip": options.clip, "encoder": options.encoder, "protocol": PROTOCOL, **asdict(item)}
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
