"""QLoRA: the frozen language model in 4 bits, by bitsandbytes through transformers."""

import importlib.util

import torch
from transformers import BitsAndBytesConfig, TrainingArguments

from sf_mllm.errors import InputError
from sf_mllm.training.processes import describe_strategy


def make_quantization_config() -> BitsAndBytesConfig:
    """Return QLoRA's settings: NF4 weights, their scales quantised again, products in bfloat16.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "quantization: 4bit needs the package bitsandbytes, which is not installed; pip install bitsandbytes, or "
            "set quantization: null."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def refuse_split_quantized_weights(arguments: TrainingArguments) -> None:
    """Refuse to split 4-bit weights among processes, which their format does not survive.

    Raises:
        InputError: the arguments ask for ZeRO-3 or FSDP.
    """
    strategy = describe_strategy(arguments)
    if strategy in ("ZeRO-3", "FSDP"):
        raise InputError(
            f"quantization: 4bit does not go with {strategy}, which splits the weights; every process holds the whole "
            "decoder in 4 bits, so start with plain torchrun, or with configs/deepspeed/zero2.json."
        )
