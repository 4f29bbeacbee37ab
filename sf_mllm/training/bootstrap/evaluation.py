"""Stage one's evaluation: what a student kept of its teacher, and where it looks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sf_mllm.data.scenes.tasks import TASK_SETS
from sf_mllm.encoder.modeling_sparseformer import SparseFormerOutput
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.losses import average_in_rois, embedding_loss, token_loss
from sf_mllm.training.bootstrap.region_snapshots import NUM_IMAGES, RegionSnapshot, save_snapshot
from sf_mllm.training.bootstrap.roi_statistics import describe_rois, measure_on_scenes
from sf_mllm.training.bootstrap.teacher_texts import make_scorer
from sf_mllm.training.bootstrap.teachers import Teacher
from sf_mllm.training.bootstrap.zero_shot import ZeroShotResult, ZeroShotScorer, compare

if TYPE_CHECKING:
    from sf_mllm.training.bootstrap.trainer import BootstrapTrainer


class BootstrapEvaluation:
    """What a run measures each time it is evaluated.

    Args:
        run_path: folder of the run, for the regions of a few images that its report draws.
        scorer: zero-shot tasks for student and teacher, or None.
        task_set: what kind of scenes the regions are measured on, a name of `TASK_SETS`, or None.
        samples: number of those scenes.
        image_size: side of the student's images in pixels.
    """

    def __init__(
        self, run_path: Path, scorer: ZeroShotScorer | None, *, task_set: str | None, samples: int, image_size: int
    ) -> None:
        self.run_path = run_path
        self.scorer = scorer
        self.task_set = task_set
        self.samples = samples
        self.image_size = image_size
        self._teacher_results: list[ZeroShotResult] | None = None

    @torch.no_grad()
    def measure(self, trainer: BootstrapTrainer) -> dict[str, float]:
        """Measure the student as it is; every process must call it, and gets the same numbers.

        Returns:
            `embedding_cosine`, `tokens_cosine`: agreement with the teacher on the held-out images, 1 is perfect; with a
            classifier also `class_agreement`, the share of them that both put into the same class; there, too, the
            entries of `describe_rois`. With zero-shot tasks the entries of `compare`; if these are about
            scenes, `roi_objects_covered`, `roi_object_share` and `roi_object_share_of_image` of `measure_on_scenes`.
        """
        student = trainer.model.eval()
        metrics = self._measure_on_held_out(trainer)
        if self.task_set is not None:
            on_scenes = self._measure_on_scenes(trainer, self.task_set)
            metrics |= {name: value for name, value in on_scenes.items() if name not in metrics}
        if self.scorer is not None:
            metrics |= self._compare_on_tasks(trainer, self.scorer)
        student.train()
        return metrics

    def _measure_on_held_out(self, trainer: BootstrapTrainer) -> dict[str, float]:
        task, student = trainer.task, trainer.model
        rows: dict[str, list[Tensor]] = defaultdict(list)
        for batch in trainer.get_eval_dataloader():
            with trainer.precision():
                output = student(task.normalise(batch["pixel_values"]), output_sampling_points=True)
                target = task.targets(batch)
            in_rois = average_in_rois(target.feature_map, output.rois[:, -1])
            row = {
                "embedding": 1 - embedding_loss(output.pooler_output, target.embedding),
                "tokens": 1 - token_loss(output.last_hidden_state[:, -in_rois.shape[1] :], in_rois),
                "rois": output.rois[:, -1],
                "points": torch.stack(output.sampling_points, dim=1),  # [B, samplings, N, P, 2]
            }
            if task.teacher.output_kind == "logits":
                row["class"] = (output.pooler_output.argmax(-1) == target.embedding.argmax(-1)).float()
            if sum(map(len, rows["pixels"])) < NUM_IMAGES:
                row["pixels"] = batch["pixel_values"]
            for name, values in row.items():
                rows[name].append(trainer.accelerator.gather_for_metrics(values.contiguous()))
        merged = {name: torch.cat(values) for name, values in rows.items()}
        if trainer.is_world_process_zero():
            pixels, rois = (merged[name][:NUM_IMAGES].cpu() for name in ("pixels", "rois"))
            save_snapshot(self.run_path, RegionSnapshot(trainer.state.global_step, pixels, rois.float()))
        metrics = {f"{name}_cosine": merged[name].mean().item() for name in ("embedding", "tokens")}
        if "class" in merged:
            metrics["class_agreement"] = merged["class"].mean().item()
        return metrics | describe_rois(merged["rois"], merged["points"].unbind(1))

    def _measure_on_scenes(self, trainer: BootstrapTrainer, task_set: str) -> dict[str, float]:
        def encode(pixels: Tensor) -> SparseFormerOutput:
            with trainer.precision():
                return trainer.model(trainer.task.normalise(pixels), output_sampling_points=True)

        # A few hundred small forward passes: every process takes all of them, which needs no gathering.
        return measure_on_scenes(
            encode, self.samples, image_size=self.image_size, device=trainer.args.device, task_set=task_set
        )

    def _compare_on_tasks(self, trainer: BootstrapTrainer, scorer: ZeroShotScorer) -> dict[str, float]:
        task = trainer.task

        def score(encode: Callable[[Tensor], Tensor]) -> list[ZeroShotResult]:
            def encode_in_precision(pixels: Tensor) -> Tensor:
                with trainer.precision():  # not for what is around it: cosines of similar texts differ by little
                    return encode(pixels)

            right = scorer.count_right(encode_in_precision, trainer.args.process_index, trainer.args.world_size)
            return scorer.results(trainer.accelerator.reduce(right, reduction="sum"))

        def ask_teacher(pixels: Tensor) -> Tensor:
            return task.teacher(task.normalise(pixels, task.teacher.preprocessing.image_size)).embedding

        if self._teacher_results is None:
            home = next(task.teacher.parameters()).device  # the CPU, if the run reads its answers from a store
            task.teacher.to(trainer.args.device)
            self._teacher_results = score(ask_teacher)
            task.teacher.to(home)
        own = score(lambda pixels: trainer.model(task.normalise(pixels)).pooler_output)
        return compare(own, self._teacher_results)


def prepare_evaluation(
    config: BootstrapConfig, teacher: Teacher, run_path: Path, device: str | torch.device
) -> BootstrapEvaluation:
    """Put together what a run's configuration asks for.

    Raises:
        InputError: the zero-shot tasks cannot be read, or the teacher cannot be asked about them.
    """
    scorer = make_scorer(config.evaluation, config.teacher, teacher, image_size=config.data.resolution, device=device)
    return BootstrapEvaluation(
        run_path,
        scorer,
        task_set=config.evaluation.zero_shot if config.evaluation.zero_shot in TASK_SETS else None,
        samples=config.evaluation.samples,
        image_size=config.data.resolution,
    )


def measure_at_end(trainer: BootstrapTrainer) -> dict[str, float]:
    """Return the measures at the last step, which the Trainer may have taken already."""
    taken = [row for row in trainer.state.log_history if "eval_embedding_cosine" in row]
    is_recent = taken and taken[-1]["step"] == trainer.state.global_step
    measures = taken[-1] if is_recent else trainer.evaluate()
    return {name: value for name, value in measures.items() if name.startswith("eval_")}


def describe_evaluation(row: Mapping[str, float]) -> str | None:
    """Put a metrics row with the Trainer's prefix "eval_" into one line; None if it is none of an evaluation."""
    if "eval_embedding_cosine" not in row:
        return None
    parts = [
        f"agreement {row['eval_embedding_cosine']:.4f} (tokens {row['eval_tokens_cosine']:.4f})",
        f"regions: spread {row['eval_roi_center_spread']:.3f}, {100 * row['eval_roi_points_outside']:.1f} % of points "
        "outside",
    ]
    if "eval_class_agreement" in row:
        parts[0] += f", same class {100 * row['eval_class_agreement']:.1f} %"
    if "eval_roi_objects_covered" in row:
        parts[-1] += f", {100 * row['eval_roi_objects_covered']:.1f} % of objects covered"
    suffix = "_teacher_accuracy"
    tasks = [name.removeprefix("eval_").removesuffix(suffix) for name in row if name.endswith(suffix)]
    if tasks:
        accuracies = ", ".join(f"{task} {100 * row[f'eval_{task}_accuracy']:.1f}" for task in tasks)
        retention = row.get("eval_mean_retention")
        said = "teacher knows none" if retention is None else f"retention {100 * retention:.2f} %"
        parts.append(f"{said}: {accuracies}")
    return "  ".join(parts)
