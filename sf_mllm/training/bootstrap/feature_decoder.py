"""A decoder that reads a teacher's feature map back out of latent tokens, trained beside the student."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sf_mllm.encoder.cortex import MLP
from sf_mllm.encoder.focusing import RoiCode
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel, SparseFormerOutput


@dataclass
class DecodedOutput(SparseFormerOutput):
    """Output of a student with what its decoder reads, `reconstruction` [B, HW, D], row by row."""

    reconstruction: Tensor | None = None


class StudentWithDecoder(nn.Module):
    """A student and its decoder as one module, since both train: only `student` is the result.

    Args:
        student: the encoder.
    """

    def __init__(self, student: SparseFormerModel) -> None:
        super().__init__()
        config = student.config
        self.student = student
        self.decoder = FeatureDecoder(
            config.hidden_size, config.num_attention_heads, config.hidden_act, config.layer_norm_eps
        )

    def forward(self, pixel_values: Tensor, *, grid: tuple[int, int], **options: Any) -> DecodedOutput:
        """Encode images and read features out of their latent tokens.

        Args:
            pixel_values: [B, 3, H, W], normalised.
            grid: rows and columns of the reconstruction.
            **options: of the student.
        """
        output = self.student(pixel_values, **options)
        latents = output.last_hidden_state[:, -output.rois.shape[2] :]
        return DecodedOutput(**output, reconstruction=self.decoder(latents, output.rois[:, -1], grid))


class FeatureDecoder(nn.Module):
    """One cross-attention block: each place asks the latent tokens, which know where they looked.

    It is kept this small so that what is read must be in the tokens.

    Args:
        width: D.
        num_heads: attention heads, a divisor of D.
        activation: name in transformers' `ACT2FN`.
        eps: of the layer norms.
    """

    def __init__(self, width: int, num_heads: int, activation: str, eps: float) -> None:
        super().__init__()
        self.place_code = RoiCode(width, eps)
        self.region_code = RoiCode(width, eps)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, 2 * width, activation)

    def forward(self, latents: Tensor, rois: Tensor, grid: tuple[int, int]) -> Tensor:
        """Read features at the cells of a grid.

        Args:
            latents: [B, N, D].
            rois: [B, N, 4], their final ones, image-relative xyxy; they get no gradient from here.
            grid: rows H and columns W.

        Returns:
            [B, HW, D], row by row.
        """
        places = self.place_code(_grid_cells(grid, rois.device)).expand(len(latents), -1, -1)  # [B, HW, D]
        memory = self.norm_latents(latents + self.region_code(rois))
        features = places + self.attn(self.norm1(places), memory, memory, need_weights=False)[0]
        return features + self.mlp(self.norm2(features))


def _grid_cells(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Cells of a grid over the image, row by row, as image-relative xyxy [HW, 4]."""
    rows, columns = (torch.arange(length, device=device, dtype=torch.float32) / length for length in grid)
    top, left = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([left, top, left + 1 / grid[1], top + 1 / grid[0]], dim=-1).flatten(0, 1)
