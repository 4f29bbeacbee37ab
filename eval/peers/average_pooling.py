"""Neighbouring patches averaged.

Source: DeCo (arXiv 2405.20985), whose compressor is a 2D adaptive average pooling without parameters; Matryoshka
multimodal models (M3, arXiv 2405.17430) pool in the same way.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from eval.peers.grid import side_of_grid, to_map, to_tokens


class AveragePooling(nn.Module):
    """Mean of each block of 2 x 2 patches: a quarter of the tokens, of the same width.

    Args:
        width: D of the patches.
        num_patches: N of them, a square grid.
    """

    def __init__(self, width: int, num_patches: int) -> None:
        super().__init__()
        self.side = side_of_grid(num_patches, 2)
        self.out_width, self.num_tokens = width, num_patches // 4

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, D] -> [B, N/4, D]."""
        return to_tokens(F.avg_pool2d(to_map(patches, self.side), 2))
