"""Transformer blocks that multiply in 8 bits."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sf_mllm.encoder.cortex import MLP
from sf_mllm.encoder.float8 import Float8Linear, Float8MLP, measure_largest_inputs, replace_modules
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError, first_line, nearest

QUANTIZATIONS = ("float8", "int8")
_FLOAT8_CAPABILITY = (8, 9)


def quantize_cortex(model: SparseFormerModel, name: str, calibration: Tensor | None = None) -> None:
    """Have the cortex of a loaded encoder multiply in 8 bits.

    It is for inference, and pays only compiled, `torch.compile(model, dynamic=False)`: as it is PyTorch quantises the
    activations in many small steps, which cost more than the products save. Focusing stays as it is, since it finds
    the regions. The model cannot be saved afterwards.

    Args:
        model: encoder, alone or the vision tower of a LLaVA-style model, on the device where it will compute.
        name: "float8" for weights in bfloat16 on a CUDA device of compute capability 8.9 or higher: scales are fixed
            once, one for the weights and one for the inputs of each layer; layers whose sizes are no multiples of 16
            stay as they are. "int8", by torchao, for any weights on any device: inputs are scaled token by token at
            each call.
        calibration: [B, 3, H, W], normalised, for float8: images of the kind and size that the model will see, a few
            dozen. The inputs that they give may be exceeded 8 times by others; what is larger yet is cut off.

    Raises:
        InputError: the name is unknown, torchao is not installed, device or weights do not go with it, or calibration
            images are missing, not wanted or unusable.
    """
    layers = (module for module in model.cortex.modules() if isinstance(module, nn.Linear))
    quantize_layers(model, layers, name, calibration)
    blocks = (module for module in model.cortex.modules() if isinstance(module, MLP))
    replace_modules(model, {mlp: Float8MLP(mlp) for mlp in blocks if Float8MLP.takes(mlp)})


def quantize_layers(
    model: nn.Module, layers: Iterable[nn.Linear], name: str, calibration: Tensor | None = None
) -> None:
    """Do what `quantize_cortex` does to any linear layers.

    Args:
        model: that the layers are in; takes the calibration images.
        layers: which. In float8 those stay as they are whose weights the model reads without calling them.
        name: see there.
        calibration: see there.

    Raises:
        InputError: see there.
    """
    layers = list(layers)
    for layer in layers:
        check_quantization(name, layer.weight.device)
        _check_weight(name, layer.weight)
    if any(isinstance(module, Float8Linear) for module in model.modules()):
        raise _quantised_already(name)
    if name == "float8":
        _quantize_to_float8(model, [layer for layer in layers if Float8Linear.takes(layer)], calibration)
        return
    if calibration is not None:
        raise InputError(f"Quantisation '{name}' scales activations at each call; leave the calibration images out.")
    from torchao.quantization import quantize_

    config = _make_int8_config()
    for layer in layers:
        quantize_(layer, config, filter_fn=lambda *_: True)
        layer.can_be_saved = False  # type: ignore[assignment]  # for StrictLoadingMixin


def check_quantization(name: str, device: torch.device) -> None:
    """Refuse what cannot be had here.

    Raises:
        InputError: there is no such quantisation, torchao is not installed, or the device cannot do it.
    """
    if name not in QUANTIZATIONS:
        raise InputError(
            f"Quantisation '{name}' is unknown.{nearest(name, QUANTIZATIONS)} Allowed: {', '.join(QUANTIZATIONS)}."
        )
    if name == "int8":
        try:
            _make_int8_config()
        except ImportError as error:
            raise InputError(
                f"Quantisation '{name}' needs the package torchao, which cannot be imported ({first_line(error)}); "
                "pip install 'sf_mllm[quantize]'."
            ) from error
    elif device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_CAPABILITY:
        raise InputError(
            f"Quantisation 'float8' needs a CUDA device of compute capability 8.9 or higher, got {device}; take int8."
        )


def _check_weight(name: str, weight: Tensor) -> None:
    if is_traceable_wrapper_subclass(weight):
        raise _quantised_already(name)
    if name == "float8" and weight.dtype != torch.bfloat16:
        # Others could be rounded too, but it is asked for to save time, and the rest would take long in them.
        dtype = str(weight.dtype).removeprefix("torch.")
        raise InputError(
            f"Quantisation 'float8' needs weights in bfloat16, got {dtype}; cast the model first, or take int8."
        )


def _quantised_already(name: str) -> InputError:
    return InputError(f"The weights are quantised already; load the model again to quantise it as '{name}'.")


def _quantize_to_float8(model: nn.Module, layers: list[nn.Linear], calibration: Tensor | None) -> None:
    if calibration is None:
        raise InputError(
            "Quantisation 'float8' fixes its scales on images; give a few dozen of the kind that the model will see, "
            "calibration=pixel_values."
        )
    are_images = calibration.dim() == 4 and calibration.shape[1] == 3 and len(calibration) > 0
    if not (are_images and calibration.is_floating_point()):
        dtype = str(calibration.dtype).removeprefix("torch.")
        raise InputError(
            "Calibration images must be normalised pixel values, [batch, 3, height, width] in a floating-point dtype, "
            f"at least one, got {list(calibration.shape)} in {dtype}."
        )
    if not layers:
        return
    weight = layers[0].weight
    largest = measure_largest_inputs(model, layers, calibration.to(weight.device, weight.dtype))
    if not all(value.isfinite() for value in largest.values()):
        raise InputError("The calibration images give values that are not finite; check their pixels.")
    replace_modules(model, {layer: Float8Linear(layer, largest[layer]) for layer in layers if layer in largest})


def _make_int8_config() -> Any:
    # Imported where it is used: torchao is an extra, and takes seconds. Its defaults would change what torch.compile
    # does in the whole process, and differ between its versions.
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, version=2)
