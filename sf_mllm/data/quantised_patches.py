"""Patch features of a teacher on a coarser grid and in 8 bits: what makes a store of them affordable."""

import torch
from torch import Tensor


def quantise(feature_map: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Average a teacher's feature map to a coarser grid and round it to 8 bits.

    Rounding changes a vector by max|x| / (127 sqrt(12) rms(x)) of its length: 0.7-1.4% where the largest entry is 3 to
    6 times the usual one, so that the cosine to the exact vector stays above 0.9999; at most 5% (0.9988) where a few
    channels are ten times larger than the others.

    Args:
        feature_map: [B, D, H, W].
        grid: G, at most H and W.

    Returns:
        patches [B, G, G, D], int8; scales [B, G, G], fp16.
    """
    pooled = _average_cells(feature_map, grid).permute(0, 2, 3, 1).contiguous()  # [B, G, G, D]
    # The scale is rounded before it divides, so that fp16 adds no error; a vector of zeros keeps any scale but 0.
    scales = (pooled.abs().amax(dim=-1) / 127).clamp_min(2**-14).half()
    patches = (pooled / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return patches, scales


def dequantise(patches: Tensor, scales: Tensor) -> Tensor:
    """Undo `quantise` up to its rounding.

    Args:
        patches: [B, G, G, D], int8.
        scales: [B, G, G].

    Returns:
        [B, D, G, G], fp32.
    """
    return (patches.float() * scales.float()[..., None]).permute(0, 3, 1, 2)


def rounding_error(feature_map: Tensor, patches: Tensor, scales: Tensor) -> float:
    """Return what `quantise(feature_map, grid)` lost by rounding: mean length of the error over that of the vector."""
    exact = _average_cells(feature_map, patches.shape[1])
    return ((dequantise(patches, scales) - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()


def _average_cells(feature_map: Tensor, grid: int) -> Tensor:
    """Average [B, D, H, W] over equal cells, [B, D, G, G] in fp32; a patch on an edge counts with what lies in a cell.

    `adaptive_avg_pool2d` takes such patches whole into both cells, which blurs more: 16 patches do not divide by 7.
    """
    rows, columns = (_overlaps(size, grid, feature_map.device) for size in feature_map.shape[-2:])
    return torch.einsum("gh,bdhw,kw->bdgk", rows, feature_map.float(), columns)


def _overlaps(size: int, grid: int, device: torch.device) -> Tensor:
    """Share of each of `size` patches in a row in each of `grid` cells, [G, size]; the shares of a cell add up to 1."""
    cells = torch.arange(grid, device=device)[:, None] * size / grid
    patches = torch.arange(size, device=device)
    return (torch.minimum(cells + size / grid, patches + 1) - torch.maximum(cells, patches)).clamp(min=0) * grid / size
