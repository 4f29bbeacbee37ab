"""Every token goes to the projector. Source: LLaVA-1.5 (arXiv 2310.03744), two linear layers with a GELU on each."""

from torch import Tensor, nn


class AllTokens(nn.Module):
    """Changes nothing.

    Args:
        width: D of the tokens.
        num_tokens: N of them.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.out_width, self.num_tokens = width, num_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> the same."""
        return tokens
