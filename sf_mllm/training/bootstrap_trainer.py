"""Stage one's task (student, frozen teacher, losses) and the Trainer that runs it."""

import contextlib
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from sf_mllm.data.images import HeldOutImages, TrainingImages
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel, SparseFormerOutput
from sf_mllm.training.bootstrap_config import LossConfig
from sf_mllm.training.losses import average_in_rois, embedding_loss, roi_hinge_loss, token_loss
from sf_mllm.training.roi_statistics import describe_rois
from sf_mllm.training.teachers import Teacher


def freeze_inherited_top(student: SparseFormerModel, num_trained_blocks: int) -> None:
    """Freeze the cortex blocks above the first few, the final norm and the projection; everything else trains."""
    student.requires_grad_(True)
    for module in (*student.cortex[num_trained_blocks:], student.norm, student.projection):
        module.requires_grad_(False)


def count_trained_blocks(num_blocks: int, first_teacher_block: int) -> int:
    """Inherited blocks that train by the paper's rule: those below two thirds of the teacher's depth.

    Args:
        num_blocks: blocks of the student's cortex.
        first_teacher_block: index of the teacher's block that became the first of them.

    Source: arXiv 2312.01987.
    """
    depth = first_teacher_block + num_blocks
    return min(max(round(2 * depth / 3) - first_teacher_block, 0), num_blocks)


class BootstrapTask:
    """What a student is asked: to agree with a frozen teacher about images, without labels or text.

    Args:
        teacher: sees each image at its own size.
        weights: of the losses.
    """

    def __init__(self, teacher: Teacher, weights: LossConfig) -> None:
        self.teacher = teacher
        self.weights = weights

    def losses(self, output: SparseFormerOutput, images: Tensor) -> dict[str, Tensor]:
        """Compare a student's output with the teacher's on the same images.

        Args:
            output: of the student on `self.normalise(images)`.
            images: [B, 3, R, R], uint8.

        Returns:
            Each loss, unweighted, [B], by the name of its weight.
        """
        assert output.last_hidden_state is not None and output.pooler_output is not None and output.rois is not None
        target = self.teacher(self.normalise(images, self.teacher.preprocessing.image_size))
        latents = output.last_hidden_state[:, -output.rois.shape[2] :]
        return {
            "embedding": embedding_loss(output.pooler_output, target.embedding),
            "tokens": token_loss(latents, average_in_rois(target.feature_map, output.rois[:, -1])),
            "roi_hinge": roi_hinge_loss(output.rois),
        }

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum, mean over images."""
        return torch.stack([getattr(self.weights, name) * loss.mean() for name, loss in losses.items()]).sum()

    def normalise(self, images: Tensor, size: int | None = None) -> Tensor:
        """Turn uint8 images into the pixels that teacher and student were made for; they share mean and deviation.

        Args:
            images: [B, 3, R, R], uint8.
            size: side to resize to; None keeps R.
        """
        pixels = images.float() / 255
        if size is not None and size != images.shape[-1]:
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.teacher.preprocessing.mean, self.teacher.preprocessing.std)
        )
        return (pixels - mean) / std


class BootstrapTrainer(Trainer):
    """Trainer whose model is the student alone, so that no checkpoint holds the teacher.

    Args:
        task: losses and teacher.
        inherited_names: parameters that come from the teacher.
        inherited_learning_rate: their peak rate; the others use `args.learning_rate`.
        **kwargs: as for `Trainer`.
    """

    model: SparseFormerModel
    train_dataset: TrainingImages
    eval_dataset: HeldOutImages

    def __init__(
        self, *, task: BootstrapTask, inherited_names: frozenset[str], inherited_learning_rate: float, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.task = task
        self.inherited_names = inherited_names
        self.inherited_learning_rate = inherited_learning_rate
        # The loss is a mean over the micro-batch, so accumulation must divide it by the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self._loss_sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._num_losses = 0
        task.teacher.to(self.args.device)
        if self.args.torch_compile:
            task.teacher.compile()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Student and teacher on one batch of uint8 images."""
        images = inputs["pixel_values"]
        output = model(self.task.normalise(images))
        with self._autocast():
            losses = self.task.losses(output, images)
        for name, loss in losses.items():
            self._loss_sums[name] += loss.detach().mean()
        self._num_losses += 1
        total = self.task.total(losses)
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss since the last log, and count epochs by images: the Trainer sees one long epoch."""
        self.state.epoch = self.train_dataset.num_epochs * self.state.global_step / self.args.max_steps
        if "loss" in logs and self._num_losses:
            for name, value in self._loss_sums.items():
                logs[f"loss_{name}"] = self.accelerator.gather(value).mean().item() / self._num_losses
            self._loss_sums.clear()
            self._num_losses = 0
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give inherited and new parameters their own rates, and decay weight matrices only."""
        if self.optimizer is None:
            student = self.model
            # Start values (regions, embeddings, class token) are no weights: decay would pull regions to a corner.
            decays = {name for name in self.get_decay_parameter_names(student) if name.endswith(".weight")}
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in student.named_parameters():
                if parameter.requires_grad:
                    groups[name in self.inherited_names, name in decays].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, student)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.inherited_learning_rate if is_inherited else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if has_decay else 0.0,
                    }
                    for (is_inherited, has_decay), parameters in sorted(groups.items())
                ],
                **options,
            )
        return self.optimizer

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure agreement with the teacher and the behaviour of the regions on held-out images."""
        student = self.model.eval()
        rows = defaultdict(list)
        for batch in self.get_eval_dataloader(eval_dataset):
            images = batch["pixel_values"]
            with self._autocast():
                output = student(self.task.normalise(images), output_sampling_points=True)
                losses = self.task.losses(output, images)
            for name in ("embedding", "tokens"):
                rows[name].append(1 - losses[name])
            rows["rois"].append(output.rois[:, -1])
            rows["points"].append(torch.stack(output.sampling_points, dim=1))  # [B, samplings, N, P, 2]
            for values in rows.values():
                values[-1] = self.accelerator.gather_for_metrics(values[-1].contiguous())
        student.train()
        merged = {name: torch.cat(values) for name, values in rows.items()}
        metrics = {f"{name}_cosine": merged[name].mean().item() for name in ("embedding", "tokens")}
        metrics |= describe_rois(merged["rois"], merged["points"].unbind(1))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Read in order: `TrainingImages` holds the whole run, already shuffled."""
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that accelerate gives to the student's training forward, for what runs outside of it."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        enabled = self.args.bf16 or self.args.fp16
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=enabled)
