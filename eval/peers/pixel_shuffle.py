"""Neighbouring patches put side by side in one wider token (space to depth).

Source: InternVL 1.5 (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637), which call it pixel shuffle. As there, nothing
is lost before the projector, whose first layer is four times as wide. InternVL norms the wide token first, and so does
this: without it features in front of a CLIP's last block, which no norm has seen, differ in scale by channel.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from eval.peers.grid import side_of_grid, to_map, to_tokens


class PixelShuffle(nn.Module):
    """Each block of 2 x 2 patches as one token, layer-normed.

    Args:
        width: D of the patches.
        num_patches: N of them, a square grid.
    """

    def __init__(self, width: int, num_patches: int) -> None:
        super().__init__()
        self.side = side_of_grid(num_patches, 2)
        self.out_width, self.num_tokens = 4 * width, num_patches // 4
        self.norm = nn.LayerNorm(self.out_width)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, D] -> [B, N/4, 4D]."""
        return self.norm(to_tokens(F.pixel_unshuffle(to_map(patches, self.side), 2)))
