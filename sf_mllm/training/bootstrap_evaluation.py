"""Stage one's evaluation: how far a student agrees with its teacher on held-out images, and where it looks."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from sf_mllm.training.roi_statistics import describe_rois

if TYPE_CHECKING:
    from sf_mllm.training.bootstrap_trainer import BootstrapTrainer


@torch.no_grad()
def evaluate_on_held_out(trainer: BootstrapTrainer) -> dict[str, float]:
    """Compare the student with its teacher on the held-out images, gathered over all processes.

    Returns:
        `embedding_cosine`, `tokens_cosine`: agreement, 1 is perfect; and the entries of `describe_rois`.
    """
    task, student = trainer.task, trainer.model.eval()
    rows = defaultdict(list)
    for batch in trainer.get_eval_dataloader():
        with trainer.precision():
            output = student(task.normalise(batch["pixel_values"]), output_sampling_points=True)
            losses = task.losses(output, task.targets(batch))
        for name in ("embedding", "tokens"):
            rows[name].append(1 - losses[name])
        rows["rois"].append(output.rois[:, -1])
        rows["points"].append(torch.stack(output.sampling_points, dim=1))  # [B, samplings, N, P, 2]
        for values in rows.values():
            values[-1] = trainer.accelerator.gather_for_metrics(values[-1].contiguous())
    student.train()
    merged = {name: torch.cat(values) for name, values in rows.items()}
    metrics = {f"{name}_cosine": merged[name].mean().item() for name in ("embedding", "tokens")}
    return metrics | describe_rois(merged["rois"], merged["points"].unbind(1))


def measure_agreement(trainer: BootstrapTrainer) -> dict[str, float]:
    """Return the held-out measures at the last step, which the Trainer may have taken already."""
    taken = [row for row in trainer.state.log_history if "eval_embedding_cosine" in row]
    is_recent = taken and taken[-1]["step"] == trainer.state.global_step
    measures = taken[-1] if is_recent else trainer.evaluate()
    return {name: value for name, value in measures.items() if name.startswith("eval_")}
