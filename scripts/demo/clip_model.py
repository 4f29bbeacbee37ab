"""The demo teacher: a small CLIP in a directory that plain open_clip loads by its `local-dir:` scheme."""

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pos_embed import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from scripts.demo.shared import refuse_used_directory
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scenes.domains import DOMAINS
from sf_mllm.data.scenes.words import BOS, EOS, PAD, WORDS, as_word

WEIGHTS_FILE = "open_clip_model.safetensors"
HEAD_WIDTH = 64
IMAGE_SIZE = 224
PATCH_SIZE = 16


def model_config(width: int, layers: int, text_layers: int, embed_dim: int, domain: str = "plain") -> dict[str, Any]:
    """Return the content of `open_clip_config.json`; both towers have the same width, the context fits the domain."""
    return {
        "model_cfg": {
            "embed_dim": embed_dim,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "width": width,
                "layers": layers,
                "head_width": HEAD_WIDTH,
            },
            "text_cfg": {
                "context_length": DOMAINS[domain].context_length,
                "vocab_size": len(WORDS),
                "hf_tokenizer_name": "tokenizer-in-this-directory",  # for a local-dir model any name means "this one"
                "width": width,
                "heads": width // HEAD_WIDTH,
                "layers": text_layers,
                "pool_type": "eos",
                "pad_id": PAD,
                "eos_id": EOS,
            },
        },
        "preprocess_cfg": {
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def create_directory(directory: Path, config: dict[str, Any]) -> None:
    """Write configuration and tokenizer into a new or empty directory.

    Raises:
        InputError: the directory holds something.
    """
    refuse_used_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    build_tokenizer(config["model_cfg"]["text_cfg"]["context_length"]).save_pretrained(directory)
    # transformers 5 writes a class name that version 4 does not know; the older name loads in both.
    tokenizer_config = directory / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def build_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """Build the word tokenizer of scene captions; articles, "and" and punctuation are dropped, a glyph is one word."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    glyph_nouns = ("digit", "digits", "letter", "letters")  # "letter a" becomes "letter_a" before articles go
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            *(normalizers.Replace(f"{noun} ", as_word(f"{noun} ")) for noun in glyph_nouns),
            normalizers.Replace(Regex(r"[.,;:!?]|\b(a|an|the|and)\b"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=context_length,
    )


def build_model(config: dict[str, Any], seed: int) -> open_clip.CLIP:
    """Build the model with fresh weights.

    open_clip leaves the image tower at PyTorch's defaults. Here it gets the initialisation of CLIP, and sin-cos
    positions at unit scale: at the usual small scale, learning places takes several times longer.
    """
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config["model_cfg"])
    visual = model.visual
    width, layers = config["model_cfg"]["vision_cfg"]["width"], config["model_cfg"]["vision_cfg"]["layers"]
    for block in visual.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        for bias in (block.attn.in_proj_bias, block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
            nn.init.zeros_(bias)
    positions = torch.from_numpy(get_2d_sincos_pos_embed(width, visual.grid_size[0], cls_token=True))
    with torch.no_grad():
        visual.positional_embedding.copy_(positions)
        nn.init.normal_(visual.class_embedding)
    return model


def save_weights(model: nn.Module, directory: Path) -> None:
    """Write the weights in half precision, atomically."""
    state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    temporary = directory / f".{WEIGHTS_FILE}.partial"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes it private
    os.replace(temporary, directory / WEIGHTS_FILE)
