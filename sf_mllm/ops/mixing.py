"""Adaptive mixing of the bootstrapped family: sampled features, decoded by matrices that each token generates."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sf_mllm.ops.implementations import REFERENCE, choose
from sf_mllm.ops.sampling import prepare_points, sample_points


def split_matrices(parameters: Tensor, channels: int, num_points: int) -> tuple[Tensor, Tensor]:
    """Return the two matrices that a token has generated.

    Args:
        parameters: [..., C * C + Q * P].
        channels: C, of the sampled features.
        num_points: P, of the sampled features.

    Returns:
        The channel matrix [..., C, C] (rows: input) and the point matrix [..., Q, P] (rows: output).
    """
    channel, point = parameters.split([channels**2, parameters.shape[-1] - channels**2], dim=-1)
    return channel.unflatten(-1, (channels, channels)), point.unflatten(-1, (-1, num_points))


def sample_and_mix(
    feature_map: Tensor,
    points_rel: Tensor,
    parameters: Tensor,
    *,
    padding_mode: str,
    implementation: str = REFERENCE,
) -> Tensor:
    """Read X at points and mix it: GELU(S (X M)).

    Args:
        feature_map: [B, C, H, W], any floating dtype.
        points_rel: [B, N, P, 2], fp32, see `sample_points`; [1, N, P, 2] if all images share them.
        parameters: [B, N, C * C + Q * P], the channel matrix M and the point matrix S, see `split_matrices`;
            [1, N, C * C + Q * P] if all images share them.
        padding_mode: "zeros" or "border", see `sample_points`.
        implementation: a name of `MIXING_IMPLEMENTATIONS`.

    Returns:
        [B, N, Q, C] in the dtype of `parameters`.

    Raises:
        ValueError: batch sizes differ, the last axis of the points is not 2, or the implementation is not loaded.

    Source: arXiv 2312.01987; official adaptive_mixing without biases.
    """
    points = prepare_points(feature_map, points_rel)
    if len(parameters) not in (1, len(feature_map)):
        raise ValueError(
            f"Parameters must be [B, N, C * C + Q * P] with the batch size of the feature map or 1, "
            f"got parameters {tuple(parameters.shape)} and features {tuple(feature_map.shape)}."
        )
    return choose(MIXING_IMPLEMENTATIONS, implementation)(feature_map, points, parameters, padding_mode)


def _sample_and_mix_by_products(feature_map: Tensor, points: Tensor, parameters: Tensor, padding_mode: str) -> Tensor:
    """The reference, one operation after the other."""
    sampled = sample_points(feature_map, points, padding_mode=padding_mode)  # [B, N, P, C]
    channel_matrix, point_matrix = split_matrices(parameters, feature_map.shape[1], points.shape[2])
    return F.gelu(point_matrix @ (sampled @ channel_matrix))


MIXING_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Tensor]] = {
    REFERENCE: _sample_and_mix_by_products
}
"""Functions of the feature map [B, C, H, W], the points [B, N, P, 2], fp32, the parameters and the padding mode; by
name. The batch size of the parameters may be 1. `sf_mllm.ops.kernels` loads further ones."""
