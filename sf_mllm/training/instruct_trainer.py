"""The Trainer of stage two."""

from typing import Any

import torch
from transformers import Trainer

from sf_mllm.vlm.adapters import trained_parameter_groups
from sf_mllm.vlm.modeling_sf_llava import SFLlavaModel


class InstructTrainer(Trainer):
    """Trainer with a learning rate of its own for the projector.

    Args:
        projector_learning_rate: peak rate of the projector; the adapters use `args.learning_rate`.
        **kwargs: as for `Trainer`.
    """

    def __init__(self, *, projector_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projector_learning_rate = projector_learning_rate
        for module in self.model.modules():
            if isinstance(module, SFLlavaModel):
                module.always_encodes = self.args.world_size > 1

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
