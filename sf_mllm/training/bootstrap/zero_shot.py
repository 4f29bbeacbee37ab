"""Zero-shot classification: the text with the highest cosine similarity to an image is the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm.data.zero_shot_tasks import NO_TEXT, ZeroShotTask

_CHUNK = 256


@dataclass
class ZeroShotResult:
    """Score of one task."""

    task: str
    accuracy: float  # 0..1
    samples: int
    chance: float  # accuracy of guessing

    @property
    def is_known(self) -> bool:
        """Whether a model knows something about the task: more than three standard errors above chance."""
        return self.accuracy > self.chance + 3 * math.sqrt(self.chance * (1 - self.chance) / self.samples)


class ZeroShotScorer:
    """Tasks and the features of their texts, made once; scores any number of image encoders.

    Args:
        tasks: each with a name of its own.
        encode_texts: texts -> [T, E] on `device`, any scale.
        image_size: side of the images in pixels.
        device: where images are made and encoded.
        prompts: class names are put in place of their "{}", and the prompts' features averaged.
    """

    def __init__(
        self,
        tasks: Sequence[ZeroShotTask],
        encode_texts: Callable[[list[str]], Tensor],
        *,
        image_size: int,
        device: str | torch.device,
        prompts: Sequence[str] = ("{}",),
    ) -> None:
        self.tasks = tasks
        self.image_size = image_size
        self.device = torch.device(device)
        self._text_features = [
            _encode_texts(task.texts, prompts if task.are_class_names else ("{}",), encode_texts) for task in tasks
        ]

    def score(self, encode_images: Callable[[Tensor], Tensor]) -> list[ZeroShotResult]:
        """Score an image encoder.

        Args:
            encode_images: [B, 3, image_size, image_size], uint8, on the device -> [B, E], any scale.
        """
        return self.results(self.count_right(encode_images))

    @torch.no_grad()
    def count_right(self, encode_images: Callable[[Tensor], Tensor], part: int = 0, num_parts: int = 1) -> Tensor:
        """Count right answers, those of every `num_parts`-th sample from `part` on.

        The sum over all parts goes into `results`; so several processes share the work and lose nothing.

        Args:
            encode_images: as for `score`.
            part: 0 .. num_parts - 1.
            num_parts: usually the number of processes.

        Returns:
            [tasks], int64, on the device.
        """
        right = torch.zeros(len(self.tasks), dtype=torch.int64, device=self.device)
        for number, (task, text_features) in enumerate(zip(self.tasks, self._text_features, strict=True)):
            for indices in torch.arange(len(task))[part::num_parts].split(_CHUNK):
                if not len(indices):  # fewer samples than parts
                    continue
                pixels = task.images.pixels(indices, self.image_size, self.device)
                similarity = F.normalize(encode_images(pixels).float(), dim=-1) @ text_features.T  # [B, T]
                choices = task.choices[indices].to(self.device)  # [B, C]
                of_choices = similarity.gather(1, choices.clamp(min=0)).masked_fill(choices == NO_TEXT, -torch.inf)
                predicted = choices.gather(1, of_choices.argmax(dim=1, keepdim=True))[:, 0]
                right[number] += (predicted == task.answers[indices].to(self.device)).sum()
        return right

    def results(self, right: Tensor) -> list[ZeroShotResult]:
        """Turn numbers of right answers, [tasks], into scores."""
        return [
            ZeroShotResult(task.name, count / len(task), len(task), task.chance)
            for task, count in zip(self.tasks, right.tolist(), strict=True)
        ]


@torch.no_grad()
def _encode_texts(texts: list[str], prompts: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Return [T, E], unit length: the mean over prompts of the unit features."""
    of_prompts = []
    for prompt in prompts:
        filled = [prompt.replace("{}", text) for text in texts]
        parts = [encode(filled[start : start + _CHUNK]) for start in range(0, len(filled), _CHUNK)]
        of_prompts.append(F.normalize(torch.cat(parts).float(), dim=-1))
    return F.normalize(torch.stack(of_prompts).mean(dim=0), dim=-1)


def compare(student: Sequence[ZeroShotResult], teacher: Sequence[ZeroShotResult]) -> dict[str, float]:
    """Say how much of what its teacher knows a student has kept, as flat entries of a metrics row.

    Args:
        student: scores.
        teacher: scores on the same tasks, in the same order.

    Returns:
        For each task `<task>_accuracy`, `<task>_teacher_accuracy`, `<task>_chance`, `<task>_samples`; for each task
        that the teacher knows (`ZeroShotResult.is_known`) `<task>_retention`, student's accuracy / teacher's; their
        mean, `mean_retention`, unless the teacher knows none.
    """
    metrics: dict[str, float] = {}
    retentions = []
    for own, known in zip(student, teacher, strict=True):
        metrics[f"{own.task}_accuracy"] = own.accuracy
        metrics[f"{own.task}_teacher_accuracy"] = known.accuracy
        metrics[f"{own.task}_chance"] = own.chance
        metrics[f"{own.task}_samples"] = own.samples
        if known.is_known:
            retentions.append(own.accuracy / known.accuracy)
            metrics[f"{own.task}_retention"] = retentions[-1]
    if retentions:
        metrics["mean_retention"] = sum(retentions) / len(retentions)
    return metrics


def format_results(results: Sequence[ZeroShotResult]) -> str:
    """Return one line with all accuracies in percent, chance in brackets."""
    return "  ".join(f"{item.task} {100 * item.accuracy:.1f} ({100 * item.chance:.1f})" for item in results)
