"""Linear layers and norms that differ from PyTorch's only in how they start, and which layers kernels may replace."""

import math

from torch import Tensor, nn
from transformers import initialization as init


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer does only what its class does: it is not quantised, wrapped, spread over devices or looked at.

    Args:
        layer: with a weight.
        kind: its class; those derived from it do something else.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is kind
        and type(layer.weight) in (nn.Parameter, Tensor)
        and not (any(hooks) or "forward" in vars(layer))
    )


class UnitLayerNorm(nn.LayerNorm):
    """Layer norm that starts with outputs of unit length: weight 1/sqrt(D)."""

    def reset_parameters(self) -> None:
        """Set the starting values."""
        init.constant_(self.weight, 1 / math.sqrt(self.normalized_shape[0]))
        init.zeros_(self.bias)


class ZeroStartLinear(nn.Linear):
    """Linear layer without bias that starts by predicting zero."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Set the starting values."""
        init.zeros_(self.weight)


class MatrixGenerator(nn.Linear):
    """Linear layer that generates a channel matrix [C, C] and a point matrix [Q, P] for each token.

    It starts with matrices that are the same for all tokens: Xavier-uniform in the bias, zero in the weight.

    Args:
        in_features: width of the bottleneck before it.
        channels: C.
        num_points: P.
        num_output_points: Q.
    """

    def __init__(self, in_features: int, channels: int, num_points: int, num_output_points: int) -> None:
        self.channels = channels
        self.num_points = num_points
        self.num_output_points = num_output_points
        super().__init__(in_features, channels**2 + num_output_points * num_points)

    def reset_parameters(self) -> None:
        """Set the starting values."""
        init.zeros_(self.weight)
        channel_part, point_part = self.bias.split([self.channels**2, self.num_output_points * self.num_points])
        channel_bound = math.sqrt(3 / self.channels)
        point_bound = math.sqrt(6 / (self.num_points + self.num_output_points))
        init.uniform_(channel_part, -channel_bound, channel_bound)
        init.uniform_(point_part, -point_bound, point_bound)
