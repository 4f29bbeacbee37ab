"""Encoders of ours as towers: they take any size as they are."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.tower import RANDOM, Tower, TowerLoader
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.layers import MatrixGenerator, ZeroStartLinear
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.published import published_config
from sf_mllm.training.instruct.part_files import find_encoder
from sf_mllm.training.instruct.parts import load_encoder

_SHORT_NAMES = {"base": "sparseformer_btsp_openai_clip_base", "large": "sparseformer_btsp_openai_clip_large"}


class EncoderTokens(nn.Module):
    """Tokens of an encoder of ours: all of them, class token included, behind the final norm, as `SFLlavaModel`."""

    def __init__(self, encoder: SparseFormerModel) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        return self.encoder(pixel_values.to(self.encoder.dtype)).last_hidden_state


def find_published_encoder(name: str) -> TowerLoader:
    """Look a published size up: "base", "large" or a full name; its weights are random.

    Raises:
        InputError: no published size has that name.
    """
    name = published_name(name)
    processor = SparseFormerImageProcessor.from_name(name)
    return lambda size: make_encoder_tower(random_encoder(name), processor, RANDOM, size)


def published_name(name: str) -> str:
    """Return the full name of a published size.

    Args:
        name: "base", "large" or a full name.

    Raises:
        InputError: no published size has that name.
    """
    name = _SHORT_NAMES.get(name, name)
    published_config(name)
    return name


def find_encoder_directory(path: str) -> TowerLoader:
    """Look up an encoder with its weights: its directory, a run folder, or a model directory of stage two.

    Raises:
        InputError: there is none.
    """
    find_encoder(path)

    def load(size: ImageSize | None) -> Tower:
        encoder, processor = load_encoder(path, torch.float32)
        return make_encoder_tower(encoder, processor, path, size)

    return load


@torch.no_grad()
def random_encoder(name: str) -> SparseFormerModel:
    """Build a published size whose zero-started layers are drawn too: regions move, and tokens mix differently.

    Args:
        name: as in `SparseFormerConfig.from_name`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = SparseFormerModel(SparseFormerConfig.from_name(name))
        for module in model.modules():
            if isinstance(module, ZeroStartLinear):
                torch.nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, MatrixGenerator):
                torch.nn.init.normal_(module.weight, std=0.1 * module.in_features**-0.5)
    return model


def make_encoder_tower(
    encoder: SparseFormerModel, processor: SparseFormerImageProcessor, weights: str, size: ImageSize | None
) -> Tower:
    """Make a tower of an encoder of ours.

    Args:
        encoder: in float32, on the CPU.
        processor: its preprocessing.
        weights: see `Tower`.
        size: of the images; None: the processor's.
    """
    return Tower(
        module=EncoderTokens(encoder),
        weights=weights,
        size=size or _own_size(processor),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        preprocess=preprocess_with(processor),
    )


def preprocess_with(processor: Any) -> Callable[[Image.Image], Tensor]:
    """Turn an image processor of transformers into a function from a picture to pixels [3, H, W]."""
    return lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0]


def _own_size(processor: Any) -> ImageSize:
    """Size of the pixels that a processor makes; where the shape follows the picture, a square."""
    size: Any = processor.crop_size if processor.do_center_crop else processor.size
    if size.get("shortest_edge"):
        return ImageSize(size["shortest_edge"], size["shortest_edge"])
    return ImageSize(size["width"], size["height"])
