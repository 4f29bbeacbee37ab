"""Which implementations of sampling there are, and how they are made ready."""

from importlib import import_module

from sf_mllm.errors import InputError, nearest

_MODULES = {"triton": "sf_mllm.ops.sampling_triton"}
"""Modules that add an implementation when they are imported, by its name."""

SAMPLING_NAMES = ("grid_sample", *_MODULES)
"""The first one is where a model starts."""


def load_sampling(name: str) -> None:
    """Make an implementation known to `sample_points`.

    Raises:
        InputError: there is none of that name, or what it needs is not installed.
    """
    if name not in SAMPLING_NAMES:
        raise InputError(
            f"Sampling implementation '{name}' is unknown.{nearest(name, SAMPLING_NAMES)} "
            f"Allowed: {', '.join(SAMPLING_NAMES)}."
        )
    if name in _MODULES:
        try:
            import_module(_MODULES[name])
        except ImportError as error:
            raise InputError(
                f"Sampling implementation '{name}' cannot be loaded ({error}); PyTorch for CUDA brings what it needs. "
                "Use 'grid_sample' here."
            ) from error
