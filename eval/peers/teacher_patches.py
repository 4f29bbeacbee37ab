"""The patch tokens of a ViT teacher, as LLaVA takes them.

Source: LLaVA (arXiv 2304.08485, 2310.03744) reads the patches in front of the CLIP's last block, without class token
and without a norm: the last block's patches are used by nothing that CLIP was trained for. A teacher whose last patches
were trained by a loss of their own may be better read there: layer -1, behind the final norm.
"""

from typing import Any

from torch import Tensor, nn

from sf_mllm.errors import InputError

LAYERS = (-2, -1)
"""In front of the last block, as LLaVA does, or behind it and its norm."""


class TeacherPatches(nn.Module):
    """Frozen tower: normalised pixels [B, 3, S, S] to patch tokens [B, N, D]; no block is run in vain.

    Args:
        visual: image tower of an open_clip model, its own ViT or a timm one.
        image_size: side S in pixels.
        layer: one of `LAYERS`.

    Raises:
        InputError: another layer.
    """

    def __init__(self, visual: Any, *, image_size: int, layer: int) -> None:
        super().__init__()
        if layer not in LAYERS:
            raise InputError(f"Teacher layer {layer} is not possible; give -2 (LLaVA's choice) or -1.")
        self.visual = visual.requires_grad_(False).eval()
        self.layer = layer
        weight = next(parameter for parameter in visual.parameters() if parameter.dim() == 4)  # of the patches
        self.width = weight.shape[0]
        self.num_tokens = (image_size // weight.shape[-1]) ** 2

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return [B, N, D], row by row of the image."""
        output = self.visual.forward_intermediates(
            pixel_values,
            indices=[self.layer],
            stop_early=True,
            normalize_intermediates=self.layer == -1,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return output["image_intermediates"][0]
