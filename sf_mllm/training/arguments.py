"""From the section `train` of a run's YAML to `transformers.TrainingArguments`."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sf_mllm.compiler import mend_compiler
from sf_mllm.errors import InputError, first_line, nearest

logger = logging.getLogger(__name__)

_SET_BY_THE_RUN = {
    "output_dir": "set output_dir at the top level",
    "seed": "set seed at the top level",
    "data_seed": "set seed at the top level",
    "resume_from_checkpoint": "a run resumes by itself when the same command is given again",
    "save_only_model": "a run could not resume without the optimizer's state",
    "ignore_data_skip": "a resumed run would see other images than an undisturbed one",
    "remove_unused_columns": "the data reaches the model whole",
    "push_to_hub": "upload the saved directory instead",
}
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_NOT_ZERO = ("max_steps", "num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_SIMPLE_KINDS = (bool, int, float, str)
"""Field types that transformers does not check itself before training starts."""


def make_training_arguments(train: dict[str, Any], checkpoints: str | Path, seed: int) -> TrainingArguments:
    """Build the Trainer's arguments from our defaults and the values of a run.

    Args:
        train: any fields of `TrainingArguments`; `max_steps` or `num_train_epochs` is required.
        checkpoints: where the Trainer writes its checkpoints.
        seed: seed of initial weights, data order and dropout.

    Raises:
        InputError: a field is unknown (the nearest one is named), belongs to the run, or has an unusable value.
    """
    fields = TrainingArguments.__dataclass_fields__
    # YAML reads a bare `no` as false; here it is the name of a strategy.
    train = {key: "no" if value is False and key.endswith("_strategy") else value for key, value in train.items()}
    for key, value in train.items():
        if key in _SET_BY_THE_RUN:
            raise InputError(f"train.{key} cannot be set; {_SET_BY_THE_RUN[key]}.")
        if key not in fields:
            raise InputError(
                f"train.{key} is not a field of transformers.TrainingArguments.{nearest(key, fields)} "
                "Remove it or correct its name."
            )
        kind = fields[key].type
        if kind in _SIMPLE_KINDS and not _is_of_kind(value, kind):
            raise InputError(f"train.{key}={value!r} has the wrong type; give a value of type {kind.__name__}.")
        if (key in _AT_LEAST_ONE and value < 1) or (key in _NOT_ZERO and value == 0):
            raise InputError(f"train.{key}={value} is not possible; give a positive number.")
    if not {"max_steps", "num_train_epochs"} & train.keys():
        raise InputError("The section 'train' does not say how long to train; set train.max_steps or num_train_epochs.")

    if train.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise InputError("train.deepspeed needs DeepSpeed, which is not installed; pip install 'sf_mllm[train]'.")

    has_cuda = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "bf16": has_cuda and torch.cuda.is_bf16_supported() and not train.get("fp16", False),
        "use_cpu": not has_cuda and not torch.backends.mps.is_available(),
        "dataloader_pin_memory": has_cuda,
        "accelerator_config": {"non_blocking": has_cuda},  # else each upload waits for all earlier work of the device
        "tf32": False,  # with torch_compile transformers would switch it on, and round what predicts coordinates
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not replaced by the mean of the losses before it
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,  # everything that trains takes part in every step
        "report_to": "none",
        "disable_tqdm": True,  # training/progress.py prints a line that also reads well in a log file
    }
    try:
        arguments = TrainingArguments(
            **{**defaults, **train},
            output_dir=str(checkpoints),
            seed=seed,
            remove_unused_columns=False,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"The section 'train' is refused by transformers: {first_line(error)}.") from error
    if arguments.n_gpu > 1:
        # One process would drive all of them by DataParallel, slowly and with a larger batch than was asked for.
        logger.warning(
            "Using one of %d GPUs; start with torchrun --nproc_per_node %d -m ... to use them all.",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    if arguments.torch_compile:
        mend_compiler()
    return arguments


def _is_of_kind(value: Any, kind: type) -> bool:
    """Whether a YAML value suits a simple field: a whole number is a float too, a truth value is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
