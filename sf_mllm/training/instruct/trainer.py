"""The Trainer of stage two."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.training.instruct.length_groups import LengthGroupedSampler
from sf_mllm.training.instruct.split_weights import gather_trained_weights, prepare_fsdp
from sf_mllm.vlm.adapters import trained_parameter_groups
from sf_mllm.vlm.modeling_sf_llava import SFLlavaModel


class InstructTrainer(Trainer):
    """Trainer with a learning rate of its own for the projector; its checkpoints hold what trains.

    `eval_loss` is the mean over all supervised tokens of the held-out rows, in whatever batches and on however many
    processes; transformers would average over batches, in which tokens of short answers count more.

    Args:
        projector_learning_rate: peak rate of the projector; the adapters use `args.learning_rate`.
        **kwargs: as for `Trainer`.

    Raises:
        InputError: the configuration of FSDP does not suit.
    """

    model: PeftModel
    train_dataset: ConversationDataset

    def __init__(self, *, projector_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs, compute_metrics=_mean_over_tokens)
        self.projector_learning_rate = projector_learning_rate
        for module in self.model.modules():
            if isinstance(module, SFLlavaModel):
                module.always_encodes = self.args.world_size > 1
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            prepare_fsdp(plugin, self.model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer that the arguments name, over our parameter groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = trained_parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                projector_learning_rate=self.projector_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Let autocast decide about products under FSDP, too, where accelerate leaves that to FSDP's own casts."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss without a cache: what transformers switches off is the whole model's, not the decoder's."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as transformers does, and put the mean over tokens in the place of the mean over batches."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        assert output.metrics is not None
        output.metrics[f"{prefix}_loss"] = output.metrics.pop(f"{prefix}_loss_per_token")
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the loss, and summed loss and number of labels of each row [B, 2] and [B, 1] for the mean over tokens.

        Reduced here and not by the Trainer's hook for it, which first pads and exchanges all outputs, whose number
        differs between processes with and without images.
        """
        loss, outputs, labels = super().prediction_step(model, inputs, False, ignore_keys)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        assert logits is not None and labels is not None
        sums = _sum_losses_of_rows(logits, labels)
        return loss, sums, sums[:, 1:]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains, gathered from all processes; the frozen weights are never gathered for it."""
        weights = gather_trained_weights(self.model)
        if self.is_world_process_zero():
            self._save(output_dir, state_dict=weights)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Group rows by the lengths that the preflight counted; transformers would open every image to count anew."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        assert self.train_dataset.lengths is not None
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(
            self.train_dataset.lengths.tolist(),
            batch_size=batch_size,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )


def _sum_losses_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Reduce the logits of a batch [B, T, V] to [B, 2]: the summed loss of each row and its number of labels."""
    targets = labels[:, 1:]
    is_supervised = targets != IGNORE_INDEX
    losses = torch.zeros(targets.shape, device=logits.device)
    losses[is_supervised] = F.cross_entropy(
        logits[:, :-1][is_supervised].float(), targets[is_supervised], reduction="none"
    )
    return torch.stack((losses.sum(dim=1), is_supervised.sum(dim=1)), dim=1)


def _mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    total, count = np.asarray(prediction.predictions).sum(axis=0, dtype=np.float64)
    return {"loss_per_token": float(total / count)}
