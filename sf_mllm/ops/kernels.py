"""Which implementations of an encoder's own operations there are, and how they are made ready."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from sf_mllm.errors import InputError, nearest
from sf_mllm.ops.implementations import REFERENCE

_OPERATIONS = ("convolution", "pooling", "stem", "sampling", "mixing", "attention", "linear_activation")
_MODULES = {"triton": tuple(f"sf_mllm.ops.{operation}_triton" for operation in _OPERATIONS)}
"""Modules that add an implementation when they are imported, by its name."""

KERNEL_NAMES = (REFERENCE, *_MODULES)
"""The first one is where a model starts."""
AUTOMATIC = "auto"
"""In place of a name: the fastest that is known to compute the same on a device, see `choose_kernels`."""
_TRIED_CAPABILITY = (9, 0)
"""Compute capability of the CUDA devices that the tests of the kernels have run on."""


def load_kernels(name: str) -> None:
    """Make an implementation of each operation known: those of `_OPERATIONS`.

    Raises:
        InputError: there is none of that name, or what it needs is not installed.
    """
    _refuse_unknown(name, KERNEL_NAMES)
    for module in _MODULES.get(name, ()):
        try:
            import_module(module)
        except ImportError as error:
            raise InputError(
                f"The kernels '{name}' cannot be loaded ({error}); PyTorch for CUDA brings what they need. "
                f"Use '{REFERENCE}' here."
            ) from error


def choose_kernels(name: str, device: torch.device) -> str:
    """Return the name of kernels for a device.

    Args:
        name: of `KERNEL_NAMES`, which is returned as it is, or `AUTOMATIC`: "triton" on CUDA devices of the kind that
            they have been tested on, the reference elsewhere.
        device: that they would run on.

    Raises:
        InputError: there are none of that name.
    """
    _refuse_unknown(name, (AUTOMATIC, *KERNEL_NAMES))
    if name != AUTOMATIC:
        return name
    is_tried = device.type == "cuda" and torch.cuda.get_device_capability(device) == _TRIED_CAPABILITY
    return "triton" if is_tried and find_spec("triton") is not None else REFERENCE


def _refuse_unknown(name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise InputError(f"Kernels '{name}' are unknown.{nearest(name, allowed)} Allowed: {', '.join(allowed)}.")


def require_cuda(tensor: Tensor, *, is_interpreted: bool) -> None:
    """Refuse a tensor that Triton's kernels cannot read.

    Args:
        tensor: of the model.
        is_interpreted: Triton runs its kernels in Python, on any device (TRITON_INTERPRET=1).

    Raises:
        InputError: it is not on a CUDA device.
    """
    if not tensor.is_cuda and not is_interpreted:
        raise InputError(
            f"The kernels 'triton' need a CUDA device, but the model is on '{tensor.device}'; use '{REFERENCE}' there."
        )
