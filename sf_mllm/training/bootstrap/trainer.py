"""The Trainer that runs stage one's task."""

import contextlib
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sf_mllm.data.image_streams import StreamedImages
from sf_mllm.data.images import HeldOutImages, TrainingImages
from sf_mllm.data.teacher_store import StoredViews
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.evaluation import BootstrapEvaluation
from sf_mllm.training.bootstrap.task import BootstrapTask
from sf_mllm.training.bootstrap.teachers import TeacherOutput
from sf_mllm.training.progress import explain_not_finite
from sf_mllm.training.step_times import StepTimes


class BootstrapTrainer(Trainer):
    """Trainer whose model is the student alone, so that no checkpoint holds the teacher.

    Args:
        task: losses and teacher.
        evaluation: what is measured at each evaluation.
        inherited_names: parameters that come from the teacher.
        inherited_learning_rate: their peak rate; the others use `args.learning_rate`.
        **kwargs: as for `Trainer`.
    """

    model: SparseFormerModel
    train_dataset: TrainingImages | StreamedImages
    eval_dataset: HeldOutImages

    def __init__(
        self,
        *,
        task: BootstrapTask,
        evaluation: BootstrapEvaluation,
        inherited_names: frozenset[str],
        inherited_learning_rate: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.args.torch_compile:
            # A graph for each resolution: one for all of them would be slower, and PyTorch 2.11 cannot make it.
            self.accelerator.state.dynamo_plugin.dynamic = False
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, len(self.train_dataset.resolutions))
        self.task = task
        self.evaluation = evaluation
        self.inherited_names = inherited_names
        self.inherited_learning_rate = inherited_learning_rate
        # The loss is a mean over the micro-batch, so accumulation must divide it by the number of micro-batches.
        self.model_accepts_loss_kwargs = False
        self._loss_names: list[str] = []
        self._loss_sums = torch.zeros((), device=self.args.device)  # [losses] from the first step on, like the next
        self._first_not_finite = torch.full((), math.inf, device=self.args.device)
        self._num_losses = 0
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.times = StepTimes(self.args.device, images_per_step=batch_size)
        self.add_callback(self.times)
        if isinstance(self.train_dataset.views, StoredViews):
            return  # the teacher is not asked: it stays where it takes no memory from the student
        task.teacher.to(self.args.device)
        if self.args.torch_compile:
            task.teacher.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of one step, and note how long that took."""
        self.times.lap("other")
        batches = super().get_batch_samples(*args, **kwargs)
        self.times.lap("data")
        return batches

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward on one micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self.times.lap("backward")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Student and teacher on one batch of uint8 images."""
        with self.precision():
            target = self.task.targets(inputs)
        self.times.lap("teacher")
        output = model(self.task.normalise(inputs["pixel_values"]), output_sampling_points=True)
        self.times.lap("student")
        losses = self.task.losses(output, target)
        self._note(losses, target)
        total = self.task.total(losses)
        self.times.lap("losses")
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss since the last log, and count epochs by images: the Trainer sees one long epoch."""
        self.state.epoch = self.train_dataset.epochs_after(self.state.global_step * self.train_dataset.step_size)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise self._explain_not_finite(logs["loss"])
        if "loss" in logs and self._num_losses:
            means = self.accelerator.gather(self._loss_sums[None]).mean(dim=0) / self._num_losses
            logs |= {f"loss_{name}": mean for name, mean in zip(self._loss_names, means.tolist(), strict=True)}
            self._loss_sums = torch.zeros_like(self._loss_sums)
            self._num_losses = 0
            logs |= self.times.end_interval()
        super().log(logs, start_time)

    def _note(self, losses: dict[str, Tensor], target: TeacherOutput) -> None:
        """Remember losses without waiting for their values: their sums, and the first steps at which they are none.

        The same of the teacher: where it fails, it is not the student's doing.
        """
        means = torch.stack([loss.detach().mean() for loss in losses.values()])
        self._loss_names, self._num_losses = list(losses), self._num_losses + 1
        self._loss_sums = self._loss_sums + means
        teacher = torch.stack([part.detach().sum(dtype=torch.float32) for part in target]).sum()
        step = torch.where(torch.cat([means, teacher[None]]).isfinite(), math.inf, self.state.global_step + 1)
        self._first_not_finite = torch.minimum(self._first_not_finite, step)

    def _explain_not_finite(self, loss: float) -> InputError:
        """Say where losses ceased to be numbers; of several processes the first one counts."""
        *firsts, teacher = self.accelerator.gather(self._first_not_finite[None]).amin(dim=0).tolist()
        if teacher <= min(firsts):
            return InputError(
                f"The loss is {loss} at step {self.state.global_step}, because the teacher's own output is no number "
                f"in step {teacher:.0f}; start a new run with train.torch_compile=false or train.bf16=false."
            )
        names = [name for name, first in zip(self._loss_names, firsts, strict=True) if first == min(firsts)]
        since = f", first in step {min(firsts):.0f} ({', '.join(names)})"
        return explain_not_finite(loss, self.state.global_step, since)

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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the student and log the result."""
        # Its batches have other sizes than those of training; compiling for each would cost more than it saves.
        with torch.compiler.set_stance("force_eager"):
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluation.measure(self).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """Read in order: the data set holds the whole run, already shuffled."""
        return torch.utils.data.SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that accelerate gives to the student's training forward, for what runs outside of it."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16
        enabled = self.args.bf16 or self.args.fp16
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=enabled)
