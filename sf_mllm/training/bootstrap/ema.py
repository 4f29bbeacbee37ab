"""Exponential moving average of the weights that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FILE = "ema.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps an exponential moving average of a module's trained parameters beside them.

    Every process computes the same one from the same parameters, so nothing is exchanged; it is meant for strategies
    that keep whole parameters everywhere: one process, DDP, DeepSpeed ZeRO 1 and 2.

    Args:
        module: what is averaged: its parameters that train when the training begins.
        decay: weight of the past in each step, at least 0 and below 1. Early steps use (1 + step) / (10 + step) where
            that is less, so that the random start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the parameters, or from the average in the checkpoint of a run that is resumed."""
        self._parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        if state.global_step > 0:
            saved = load_file(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE)
            if saved.keys() != self._averages.keys():
                raise RuntimeError(f"{_FILE} holds other parameters than those that train.")
            for name, average in self._averages.items():
                average.copy_(saved[name])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the parameters of one more step into the average."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), list(self._parameters.values()), 0)

    def save(self, checkpoint: Path) -> None:
        """Write the average into the folder of a checkpoint."""
        save_file({name: average.contiguous() for name, average in self._averages.items()}, checkpoint / _FILE)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Put the average into the module for as long as the block lasts."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.copy_(self._averages[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.copy_(trained[name])
