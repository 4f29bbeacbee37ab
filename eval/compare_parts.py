"""What `eval.compare_encoders` compares: the settings shared by all variants, and each variant's frozen tower."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from eval.peers.all_tokens import AllTokens
from eval.peers.average_pooling import AveragePooling
from eval.peers.pixel_shuffle import PixelShuffle
from eval.peers.resampler import Resampler
from eval.peers.teacher_patches import TeacherPatches
from sf_mllm.assets import resolve_demo
from sf_mllm.bench.our_towers import EncoderTokens
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError, nearest
from sf_mllm.training.bootstrap.config import TeacherConfig
from sf_mllm.training.bootstrap.teachers import OpenClipTeacher, load_teacher
from sf_mllm.training.instruct.parts import load_decoder, load_encoder

OF_TEACHER = ("patches", "pixel-shuffle", "resampler", "pooled")
"""Variants that read the teacher's patches, the slowest to train first."""
NO_IMAGE = "none"
OURS = "ours-"

_TINY_IMAGE = 64
_TINY_HEADS = 2
_HEAD_WIDTH = 64  # of a resampler's attention


@dataclass(frozen=True)
class Settings:
    """What all variants share; each field decides results."""

    size: str  # demo, or tiny: random small models
    teacher: str  # open_clip model that brings its weights, or "demo:clip"
    encoders: tuple[str, ...]  # encoders of ours
    decoder: str
    domain: str  # of the scenes
    scenes: int  # training scenes
    questions: int  # held-out ones
    steps: int
    batch_size: int  # conversations
    learning_rate: float  # of the adapters
    lora_rank: int
    max_length: int  # tokens of a conversation, visual ones not counted


@dataclass(frozen=True)
class Tower:
    """A frozen encoder.

    Attributes:
        module: pixel values [B, 3, H, W] to tokens [B, N, D].
        prepare: images [B, 3, S, S] uint8 to pixel values.
        width: D.
        num_tokens: N.
    """

    module: nn.Module
    prepare: Callable[[Tensor], Tensor]
    width: int
    num_tokens: int


class Parts:
    """Loads models by the settings, each of them anew or once, as it is needed.

    Args:
        settings: which models.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._image_size: int | None = None

    def variants(self) -> list[str]:
        """Return the names of all variants.

        Raises:
            InputError: two encoders have the same number of tokens.
        """
        ours = [f"{OURS}{self._load_encoder(path)[0].config.num_tokens}" for path in self.settings.encoders]
        if len(set(ours)) < len(ours):
            raise InputError(f"The encoders' variants are {', '.join(ours)}; give encoders of different token numbers.")
        return [*OF_TEACHER, *ours, NO_IMAGE]

    def tower(self, variant: str, layer: int, dtype: torch.dtype = torch.float32) -> Tower | None:
        """Load the tower of a variant on the CPU; None where there is no image.

        Args:
            variant: one of `variants()`.
            layer: of the teacher, see `peers.teacher_patches`; plays no part elsewhere.
            dtype: of the weights.
        """
        if variant == NO_IMAGE:
            return None
        if variant in OF_TEACHER:
            return self._teacher_tower(layer, dtype)
        tokens = variant.removeprefix(OURS)
        for path in self.settings.encoders:
            encoder, image_processor = self._load_encoder(path, dtype)
            if str(encoder.config.num_tokens) == tokens:
                prepare = functools.partial(_process, image_processor)
                return Tower(EncoderTokens(encoder), prepare, encoder.config.hidden_size, encoder.config.num_tokens)
        raise InputError(
            f"Variant '{variant}' is unknown.{nearest(variant, self.variants())} "
            f"Variants: {', '.join(self.variants())}."
        )

    def peer(self, variant: str, tower: Tower | None, decoder: Any) -> Any:
        """Make what a variant puts between tower and projector, with random weights where it has some."""
        width, tokens = (tower.width, tower.num_tokens) if tower is not None else (decoder.config.hidden_size, 0)
        if variant == "pooled":
            return AveragePooling(width, tokens)
        if variant == "pixel-shuffle":
            return PixelShuffle(width, tokens)
        if variant == "resampler":
            out_width = decoder.config.hidden_size
            return Resampler(width, tokens, out_width=out_width, heads=max(1, out_width // _HEAD_WIDTH))
        return AllTokens(width, tokens)

    def decoder(self, dtype: torch.dtype = torch.float32) -> tuple[Any, PreTrainedTokenizerBase]:
        """Load decoder and tokenizer, on the CPU."""
        if self.settings.size != "tiny":
            return load_decoder(self.settings.decoder, dtype)
        tokenizer = self.tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=_TINY_HEADS,
                tie_word_embeddings=True,
                initializer_range=0.2,  # large enough for the answers of random weights to differ
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
            )
            decoder: Any = LlamaForCausalLM(config)
            return decoder.to(dtype), tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the decoder's tokenizer alone."""
        return AutoTokenizer.from_pretrained(resolve_demo(self.settings.decoder))

    @property
    def image_size(self) -> int:
        """Side of the images in pixels: the teacher's, for all variants."""
        if self._image_size is None:
            self._image_size = self._load_teacher()[1]
        return self._image_size

    def _teacher_tower(self, layer: int, dtype: torch.dtype) -> Tower:
        visual, image_size, mean, std = self._load_teacher()
        module = TeacherPatches(visual, image_size=image_size, layer=layer).to(dtype)

        def prepare(images: Tensor) -> Tensor:
            shift, scale = (images.new_tensor(values, dtype=dtype)[:, None, None] for values in (mean, std))
            return (images.to(dtype) / 255 - shift) / scale

        return Tower(module, prepare, module.width, module.num_tokens)

    def _load_teacher(self) -> tuple[Any, int, tuple[float, ...], tuple[float, ...]]:
        """Return image tower, side of its images, mean and deviation of their channels."""
        if self.settings.size == "tiny":
            vision = {"image_size": _TINY_IMAGE, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
            text = {"context_length": 4, "vocab_size": 4, "width": 16, "heads": 1, "layers": 1}
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return open_clip.CLIP(8, vision, text).visual, _TINY_IMAGE, CLIP_MEAN, CLIP_STD
        teacher = load_teacher(TeacherConfig(model=self.settings.teacher))
        assert isinstance(teacher, OpenClipTeacher)
        shape = teacher.preprocessing
        return teacher.visual, shape.image_size, shape.mean, shape.std

    def _load_encoder(
        self, path: str, dtype: torch.dtype = torch.float32
    ) -> tuple[SparseFormerModel, SparseFormerImageProcessor]:
        if self.settings.size != "tiny":
            return load_encoder(path, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            config = SparseFormerConfig(
                stem_channels=8,
                num_latents=3,
                focusing_size=16,
                focusing_repeats=1,
                focusing_num_attention_heads=_TINY_HEADS,
                num_sampling_points=4,
                focusing_mixing_size=8,
                sampling_mixing_size=8,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=_TINY_HEADS,
                intermediate_size=64,
                projection_size=8,
            )
            side = {"height": _TINY_IMAGE, "width": _TINY_IMAGE}
            return SparseFormerModel(config), SparseFormerImageProcessor(size=side)


def _process(image_processor: SparseFormerImageProcessor, images: Tensor) -> Tensor:
    return image_processor(images, return_tensors="pt")["pixel_values"]
