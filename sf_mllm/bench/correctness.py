"""Nothing is timed before it computes what the same model computes in eager float32."""

import torch
from torch import Tensor

from sf_mllm.bench.precision import TOLERANCES

_SMALLEST_DIFFERENCE = 1e-5
"""Between the outputs for two images, over their length; less is no output of a model that looks at its input."""


class WrongResultError(Exception):
    """A model computes something else than it should."""


def check_reference(output: Tensor) -> None:
    """Make sure that there is something to compare with.

    Args:
        output: [B, ...] for B different inputs.

    Raises:
        WrongResultError: it is not finite, or the same for different inputs.
    """
    if not torch.isfinite(output).all():
        raise WrongResultError("wrong: not finite in eager float32")
    if len(output) > 1 and _distance(output[1:], output[:1].expand_as(output[1:])) < _SMALLEST_DIFFERENCE:
        raise WrongResultError("wrong: different inputs give the same output in eager float32")


def check_output(output: Tensor, reference: Tensor, precision: str, tolerance: float | None = None) -> float:
    """Compare an output with the reference.

    Args:
        output: [B, ...]; of a larger batch than the reference the first ones are compared.
        reference: of eager float32.
        precision: that decides what is close enough.
        tolerance: largest relative error that passes; None: that of the precision.

    Returns:
        The relative error: distance over the length of the reference.

    Raises:
        WrongResultError: it is too large.
    """
    if output.shape[1:] != reference.shape[1:]:
        raise WrongResultError(f"wrong: shape {list(output.shape)}, in eager float32 {list(reference.shape)}")
    count = min(len(output), len(reference))
    error = _distance(output[:count], reference[:count])
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    if not error <= tolerance:  # also if it is not a number
        raise WrongResultError(f"wrong: relative error {error:.2g} against eager float32, at most {tolerance:g} passes")
    return error


def _distance(output: Tensor, reference: Tensor) -> float:
    ours, theirs = output.double().cpu(), reference.double().cpu()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
