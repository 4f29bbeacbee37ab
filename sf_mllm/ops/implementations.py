"""What the operations that exist in several implementations share."""

from collections.abc import Mapping
from typing import TypeVar

REFERENCE = "torch"
"""The one by PyTorch's own operations: it works on every device, and the others must agree with it."""
OperationT = TypeVar("OperationT")


def choose(loaded: Mapping[str, OperationT], name: str) -> OperationT:
    """Look an implementation up.

    Raises:
        ValueError: it is not loaded, see `sf_mllm.ops.kernels`.
    """
    if name not in loaded:
        known = ", ".join(f"'{other}'" for other in loaded)
        raise ValueError(f"Implementation '{name}' is not loaded; there is: {known}.")
    return loaded[name]
