"""The cortex: plain pre-norm transformer blocks, weight-compatible with those of a ViT."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from sf_mllm.encoder.layers import is_plain
from sf_mllm.ops.attention import attend
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.linear_activation import linear_activation


def drop_path(branch: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth: zero the residual branch of some samples and scale up the others.

    Args:
        branch: [B, ...].
        probability: of dropping a sample's branch, in [0, 1).
        training: no effect when false.
    """
    if not training or probability == 0.0:
        return branch
    keep = branch.new_empty([branch.shape[0]] + [1] * (branch.dim() - 1)).bernoulli_(1 - probability)
    return branch * keep / (1 - probability)


class Attention(nn.Module):
    """Multi-head self-attention with packed projections, rows [q; k; v] and contiguous heads, as in ViTs.

    Attributes:
        kernels: see `SparseFormerModel.set_kernels`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.kernels = REFERENCE
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix tokens [B, T, D] -> [B, T, D]."""
        return self.proj(attend(self.qkv(tokens), self.num_heads, self.kernels))


class MLP(nn.Module):
    """Linear, activation, linear.

    Args:
        width: of the tokens, D.
        hidden: width between the two layers.
        activation: name in transformers' `ACT2FN`.

    Attributes:
        kernels: see `SparseFormerModel.set_kernels`.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.kernels = REFERENCE
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.act: Callable[[Tensor], Tensor] = ACT2FN[activation]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token of [B, T, D] by itself."""
        if self.kernels == REFERENCE or not is_plain(self.fc1, nn.Linear):
            return self.fc2(self.act(self.fc1(tokens)))
        return self.fc2(linear_activation(tokens, self.fc1.weight, self.fc1.bias, self.activation, self.kernels))


class CortexBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP; holds the weights of one ViT block.

    Args:
        width: D.
        num_heads: attention heads, a divisor of D.
        hidden: width of the MLP.
        activation: name in transformers' `ACT2FN`; OpenAI CLIP needs "quick_gelu".
        eps: of both layer norms.
        drop_path_rate: stochastic depth of both branches.
    """

    def __init__(
        self, width: int, num_heads: int, hidden: int, activation: str, eps: float, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden, activation)
        self.drop_path_rate = drop_path_rate

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T, D] -> [B, T, D]."""
        tokens = tokens + drop_path(self.attn(self.norm1(tokens)), self.drop_path_rate, self.training)
        return tokens + drop_path(self.mlp(self.norm2(tokens)), self.drop_path_rate, self.training)
