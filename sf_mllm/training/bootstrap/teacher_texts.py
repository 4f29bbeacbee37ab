"""What a teacher can be asked in words: features of texts from its own text tower, or the classes of its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from sf_mllm.data.scenes.tasks import TASK_SETS, build_tasks
from sf_mllm.data.zero_shot_tasks import TASKS_FILE, ZeroShotTask, read_task_folder
from sf_mllm.encoder.vit_timm import read_class_names
from sf_mllm.errors import InputError, first_line, nearest
from sf_mllm.training.bootstrap.config import EvaluationConfig, TeacherConfig
from sf_mllm.training.bootstrap.teachers import OpenClipTeacher, Teacher, TimmTeacher, load_clip, resolve_model
from sf_mllm.training.bootstrap.zero_shot import ZeroShotScorer

TextEncoder = Callable[[list[str]], Tensor]


def make_scorer(
    config: EvaluationConfig,
    teacher_config: TeacherConfig,
    teacher: Teacher,
    *,
    image_size: int,
    device: str | torch.device,
) -> ZeroShotScorer | None:
    """Prepare the zero-shot tasks of a run; None if it has none.

    Args:
        config: names the tasks.
        teacher_config: of `teacher`, whose text tower is loaded for as long as the texts are encoded.
        teacher: of the run.
        image_size: side of the student's images in pixels.
        device: of the run.

    Raises:
        InputError: the tasks cannot be read, or the teacher cannot be asked about them.
    """
    if config.zero_shot is None:
        return None
    tasks = read_tasks(config.zero_shot, config.samples)
    prompts: Sequence[str] = ("{}",)
    if isinstance(teacher, OpenClipTeacher):
        tasks = [name_classes(task) for task in tasks]
        prompts = config.prompts
        encode_texts = load_text_encoder(teacher_config, device)
    else:
        encode_texts = _ask_head(teacher, tasks, device)
    return ZeroShotScorer(tasks, encode_texts, image_size=image_size, device=device, prompts=prompts)


def read_tasks(name: str, samples: int) -> list[ZeroShotTask]:
    """Return the tasks of a built-in set, a name of `TASK_SETS`, or of a folder, see `read_task_folder`.

    Raises:
        InputError: it is neither.
    """
    if name in TASK_SETS:
        return build_tasks(samples, task_set=name)
    if not Path(name).is_dir():
        raise InputError(
            f"Zero-shot tasks '{name}' are neither built in nor a folder.{nearest(name, TASK_SETS)} "
            f"Built in: {', '.join(TASK_SETS)}; a folder holds {TASKS_FILE} or a folder of images for each class."
        )
    return read_task_folder(name, samples)


def load_text_encoder(config: TeacherConfig, device: str | torch.device) -> TextEncoder:
    """Load a CLIP's text tower and tokenizer.

    Returns:
        A function from texts to their features, [T, proj], not normalised; the tower is freed together with it.

    Raises:
        InputError: model or tokenizer cannot be loaded.
    """
    clip = load_clip(config)
    clip.visual = None
    clip = clip.to(device).eval()
    try:
        tokenizer = open_clip.get_tokenizer(resolve_model(config.model))
    except Exception as error:  # the hub and the tokenizer libraries raise almost any type here
        raise InputError(
            f"The tokenizer of teacher '{config.model}' cannot be loaded: {first_line(error)}; zero-shot tasks need it "
            "(evaluation.zero_shot=null goes without)."
        ) from error

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return clip.encode_text(tokenizer(texts).to(device))

    return encode


def name_classes(task: ZeroShotTask) -> ZeroShotTask:
    """Turn names of class folders into words: ImageNet's ids into its class names, underscores into spaces."""
    if not task.are_class_names:
        return task
    ids = ImageNetInfo("imagenet-1k").label_names()
    if set(task.texts) <= set(ids):
        return replace(task, texts=[IMAGENET_CLASSNAMES[ids.index(name)] for name in task.texts])
    return replace(task, texts=[name.replace("_", " ") for name in task.texts])


def _ask_head(teacher: TimmTeacher, tasks: Sequence[ZeroShotTask], device: str | torch.device) -> TextEncoder:
    """Stand a classifier's classes for texts: the feature of a class is a unit vector along its logit."""
    names = read_class_names(teacher.vit)
    if names is None:
        raise InputError(
            "This timm teacher gives embeddings but has no text tower, so it cannot be asked about "
            "evaluation.zero_shot; set that to null."
        )
    number_of = _number_classes(names, teacher.vit.pretrained_cfg.get("label_names"))
    for task in tasks:
        unknown = [text for text in task.texts if text not in number_of]
        if unknown:
            raise InputError(
                f"The teacher is a classifier, and '{unknown[0]}' is none of its classes; set evaluation.zero_shot to "
                f"a folder that holds folders of images named after its classes (for example '{names[0]}') or numbered "
                f"from 0 to {len(names) - 1}."
            )

    def encode(texts: list[str]) -> Tensor:
        return F.one_hot(torch.tensor([number_of[text] for text in texts], device=device), num_classes=len(names))

    return encode


def _number_classes(names: Sequence[str], labels: Sequence[str] | None) -> dict[str, int]:
    """Return the index of each class by all that a folder may call it.

    Args:
        names: in the order of the logits; of several with commas between them the first one will do, too.
        labels: the classes' short names, if they have any; ImageNet's ids are known.
    """
    subset = infer_imagenet_subset({"num_classes": len(names)})
    if labels is None and subset is not None:
        labels = ImageNetInfo(subset).label_names()
    numbers: dict[str, int] = {}
    for spellings in (names, labels or (), [name.split(", ")[0] for name in names], map(str, range(len(names)))):
        for index, name in enumerate(spellings):
            numbers.setdefault(name, index)
            numbers.setdefault(name.replace(" ", "_"), index)
    return numbers
