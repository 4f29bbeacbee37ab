"""Weights of which each process holds a part: loaded whole, split by the Trainer (ZeRO-3, FSDP), gathered again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sf_mllm.training.run_folder import is_main_process


@contextmanager
def whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Within this context models are loaded whole in every process; under ZeRO-3 transformers would split them at once.

    Joining parts, taking fingerprints and placing adapters need whole weights. The Trainer splits them afterwards.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def has_split_weights(model: nn.Module) -> bool:
    """Whether this process holds only a part of each weight, as under ZeRO-3 and FSDP once training began."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every weight that trains, whole and on the CPU; all processes must call this together.

    Returns:
        By parameter name in the main process; nothing in the others.
    """
    gathered = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole(parameter) as weight:
                if is_main_process():
                    gathered[name] = weight.detach().to("cpu", copy=True)
    return gathered


@contextmanager
def _whole(parameter: Tensor) -> Iterator[Tensor]:
    if hasattr(parameter, "ds_id"):
        import deepspeed  # an optional dependency, which is there if it split this weight

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
