"""Put a SparseFormer into an open_clip CLIP model as its image tower."""

from typing import Any

from torch import Tensor, nn

from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError


class OpenClipTower(nn.Module):
    """The interface that open_clip expects of `visual`: images in, embeddings out.

    Args:
        encoder: whose `pooler_output` lies in the CLIP space.
        image_size: (height, width) that open_clip reads for its preprocessing; the encoder itself takes any size.
    """

    def __init__(self, encoder: SparseFormerModel, image_size: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_size = image_size
        self.output_dim = encoder.config.projection_size or encoder.config.hidden_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] -> [B, projection_size], not normalised."""
        return self.encoder(pixel_values).pooler_output

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower, as open_clip's `lock_image_tower` asks; partial unlocking is not supported."""
        if unlocked_groups:
            raise InputError("A SparseFormer tower can be locked as a whole only; use unlocked_groups=0.")
        self.encoder.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Switch activation checkpointing, as open_clip's `set_grad_checkpointing` asks."""
        if enable:
            self.encoder.gradient_checkpointing_enable()
        else:
            self.encoder.gradient_checkpointing_disable()


def replace_visual(clip: nn.Module, encoder: SparseFormerModel) -> nn.Module:
    """Make a CLIP model encode images with a SparseFormer; its own text tower stays.

    Args:
        clip: model of `open_clip.create_model`; changed in place.
        encoder: student bootstrapped from a CLIP with the same embedding space.

    Returns:
        The same model. `encode_image` and `forward` now run the encoder.

    Raises:
        InputError: `clip` has no image tower, or the embedding widths differ.
    """
    visual = getattr(clip, "visual", None)
    if visual is None:
        raise InputError(f"A {type(clip).__name__} has no image tower `visual`; pass an open_clip CLIP model.")
    tower = OpenClipTower(encoder, visual.image_size)
    expected = _embedding_width(visual)
    if tower.output_dim != expected:
        raise InputError(f"The encoder embeds into {tower.output_dim} dimensions, this CLIP model into {expected}.")
    clip.visual = tower
    return clip


def _embedding_width(visual: Any) -> int:
    """Width of what an image tower gives; open_clip's wrapper of timm models does not tell it."""
    if hasattr(visual, "output_dim"):
        return visual.output_dim
    # Whatever its head is made of ends in a linear layer; without a head the trunk gives what it gives.
    layers = [layer.out_features for layer in visual.head.modules() if isinstance(layer, nn.Linear)]
    return layers[-1] if layers else visual.trunk.num_classes or visual.trunk.num_features
