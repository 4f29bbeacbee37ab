"""Transformer blocks that multiply in 8 bits, by torchao."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError, first_line, nearest

QUANTIZATIONS = ("float8", "int8")
_FLOAT8_CAPABILITY = (8, 9)


def quantize_cortex(model: SparseFormerModel, name: str) -> None:
    """Have the cortex of a loaded encoder multiply in 8 bits: weights once, activations at each call, token by token.

    It is for inference, and pays only compiled, `torch.compile(model, dynamic=False)`: as it is PyTorch quantises the
    activations in many small steps, which cost more than the products save. Focusing stays as it is, since it finds
    the regions. The model cannot be saved afterwards.

    Args:
        model: encoder, alone or the vision tower of a LLaVA-style model, on the device where it will compute.
        name: "float8" for weights in bfloat16 on a CUDA device of compute capability 8.9 or higher; layers whose sizes
            are no multiples of 16 stay as they are. "int8" for any weights on any device.

    Raises:
        InputError: the name is unknown, torchao is not installed, or device or weights do not go with it.
    """
    quantize_layers((module for module in model.cortex.modules() if isinstance(module, nn.Linear)), name)


def quantize_layers(layers: Iterable[nn.Linear], name: str) -> None:
    """Do what `quantize_cortex` does to any linear layers.

    Raises:
        InputError: see there.
    """
    layers = list(layers)
    for layer in layers:
        check_quantization(name, layer.weight.device)
        _check_weight(name, layer.weight)
    from torchao.quantization import quantize_

    config = _make_config(name)
    for layer in layers:
        quantize_(layer, config, filter_fn=lambda *_: True)


def check_quantization(name: str, device: torch.device) -> None:
    """Refuse what cannot be had here.

    Raises:
        InputError: there is no such quantisation, torchao is not installed, or the device cannot do it.
    """
    if name not in QUANTIZATIONS:
        raise InputError(
            f"Quantisation '{name}' is unknown.{nearest(name, QUANTIZATIONS)} Allowed: {', '.join(QUANTIZATIONS)}."
        )
    try:
        _make_config(name)
    except ImportError as error:
        raise InputError(
            f"Quantisation '{name}' needs the package torchao, which cannot be imported ({first_line(error)}); "
            "pip install 'sf_mllm[quantize]'."
        ) from error
    if name == "float8" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY
    ):
        raise InputError(
            f"Quantisation 'float8' needs a CUDA device of compute capability 8.9 or higher, got {device}; take int8."
        )


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if is_traceable_wrapper_subclass(weight):
        raise InputError(f"The weights are quantised already; load the model again to quantise it as '{name}'.")
    if name == "float8" and weight.dtype != torch.bfloat16:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise InputError(
            f"Quantisation 'float8' needs weights in bfloat16, got {dtype}; cast the model first, or take int8."
        )


def _make_config(name: str) -> Any:
    # Imported where it is used: torchao is an extra, and takes seconds. Its defaults would change what torch.compile
    # does in the whole process, differ between its versions, and take other kernels where another package is installed.
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )
    from torchao.quantization.quantize_.common import KernelPreference

    if name == "int8":
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, version=2)
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), kernel_preference=KernelPreference.TORCH, set_inductor_config=False
    )
