"""Precisions and modes in which a tower runs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sf_mllm.bench.choices import COMPILE_MODES
from sf_mllm.bench.our_towers import EncoderTokens
from sf_mllm.compiler import mend_compiler
from sf_mllm.encoder.quantization import QUANTIZATIONS, check_quantization, quantize_cortex, quantize_layers
from sf_mllm.errors import InputError

_WEIGHTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}
_AUTOCAST = {"bfloat16-autocast": torch.bfloat16, "float16-autocast": torch.float16}
CALIBRATED = ("float8",)
"""Precisions that need images to fix their scales on."""
TOLERANCES = {
    "float32": 1e-3,
    "tf32": 0.02,
    "bfloat16": 0.1,
    "float16": 0.02,
    "bfloat16-autocast": 0.1,
    "float16-autocast": 0.02,
    "float8": 0.1,
    "int8": 0.1,
}
"""Largest relative error against eager float32 that passes: about twice the largest of eval/results/precision.csv for
the 16-bit ones, and what bfloat16 gets for the 8-bit ones. What computes something else is off by far more."""


def check_support(precision: str, mode: str, device: torch.device) -> None:
    """Refuse what cannot be done here.

    Raises:
        InputError: the device cannot do it, or torchao is not installed.
    """
    if precision in QUANTIZATIONS:
        check_quantization(precision, device)
    if device.type != "cuda":
        if precision == "tf32":
            raise InputError(f"Precision 'tf32' needs a CUDA device, got {device}; take float32.")
        if mode == "cuda-graphs":
            raise InputError(f"Mode 'cuda-graphs' needs a CUDA device, got {device}; take eager or compiled.")


def prepare_variant(
    module: nn.Module,
    precision: str,
    mode: str,
    device: torch.device,
    kernels: str | None = None,
    calibration: Tensor | None = None,
) -> nn.Module:
    """Return a copy of a float32 module on the device, cast, quantised and compiled; calls need `computing_in`.

    Args:
        module: of a tower.
        precision: of `choices.PRECISIONS`.
        mode: of `choices.MODES`.
        device: to compute on.
        kernels: see `Tower.kernels`.
        calibration: [B, 3, H, W], normalised; for `CALIBRATED` precisions, which fix their scales on them.

    Raises:
        InputError: there is nothing to quantise, or nothing to fix scales on.
    """
    variant = copy.deepcopy(module).to(device, _WEIGHTS.get(precision, torch.float32))
    if kernels is not None:
        assert isinstance(variant, EncoderTokens), "other towers have none"
        variant.encoder.set_kernels(kernels)
    if precision in QUANTIZATIONS:
        _quantize_blocks(variant, precision, calibration)
    if mode == "eager":
        return variant
    mend_compiler()
    return torch.compile(variant, dynamic=False, mode=COMPILE_MODES[mode])  # type: ignore[return-value]


def _quantize_blocks(variant: nn.Module, name: str, calibration: Tensor | None) -> None:
    """Quantise the transformer blocks of any tower as `quantize_cortex` quantises ours."""
    if isinstance(variant, EncoderTokens):
        quantize_cortex(variant.encoder, name, calibration)
        return
    # Of whatever library: blocks are what a tower has a numbered list of. The output layer of PyTorch's own attention
    # is read by the attention itself, which takes no quantised weights; its input layer is no linear layer at all.
    layers = [
        module
        for path, module in variant.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and any(step.isdecimal() for step in path.split("."))
    ]
    if not layers:
        raise InputError(f"The tower has no blocks with linear layers, so that '{name}' would change nothing.")
    quantize_layers(variant, layers, name, calibration)


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Switch TF32 and autocast as a precision says, and gradients off."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    autocast = torch.autocast(device.type, _AUTOCAST.get(precision, torch.bfloat16), enabled=precision in _AUTOCAST)
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        with torch.inference_mode(), autocast:
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
