"""Models that answer, by name: the shipped one, a directory or hub id, or random ones of full size."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sf_mllm.bench.choices import RANDOM_CHATS
from sf_mllm.bench.images import DISTINCT_IMAGES, Images
from sf_mllm.bench.random_models import (
    SIZES,
    count_visual_tokens,
    join_sparseformer,
    join_stock_llava,
    make_decoder,
)
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.tower import RANDOM
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.errors import InputError, nearest
from sf_mllm.inference.loading import load_model

QUESTION = "How many objects are there?"
PICTURE_SIZE = ImageSize(640, 480)
"""Of drawings; the user's pictures are taken as they are."""


@dataclass(frozen=True)
class ChatModel:
    """A model that answers, on its device.

    Attributes:
        model: of transformers' LLaVA family.
        weights: "random", or where trained ones come from.
        make_inputs: from a number of conversations, an image and a question each, to what the model takes.
        has_processor: whether that includes the preprocessing of pictures and texts, and so can be timed.
    """

    model: Any
    weights: str
    make_inputs: Callable[[int], dict[str, Tensor]]
    has_processor: bool


def find_chat_model(name: str) -> None:
    """Refuse a random model that there is none of; what is to be loaded is looked for when it is loaded.

    Raises:
        InputError: there is none.
    """
    if name.startswith("random:") and name not in RANDOM_CHATS:
        raise InputError(
            f"Random chat model '{name}' is unknown.{nearest(name, RANDOM_CHATS)} There are: {', '.join(RANDOM_CHATS)}."
        )


def load_chat_model(
    name: str, device: torch.device, precision: str, images: Images, *, question: str | None, text_tokens: int
) -> ChatModel:
    """Load a model.

    Args:
        name: "demo", a directory or hub id, or one of `RANDOM_CHATS`.
        device: for the model and its inputs.
        precision: of the weights, by the name of the PyTorch type.
        images: to ask about.
        question: to ask a loaded model; None: `QUESTION`.
        text_tokens: of the prompt of a random model, which has no tokenizer.

    Raises:
        InputError: there is no such model, or its files cannot be used.
    """
    if name in RANDOM_CHATS:
        return _make_random(name, device, getattr(torch, precision), images, text_tokens)
    path = "demo:sf_llava" if name == "demo" else name
    processor: Any
    model, processor = load_model(path, str(device), precision)
    asked = QUESTION if question is None else question

    pictures = images.pictures(DISTINCT_IMAGES, PICTURE_SIZE)

    def make_inputs(batch: int) -> dict[str, Tensor]:
        chosen = [pictures[index % len(pictures)] for index in range(batch)]
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": asked}]}]
            for picture in chosen
        ]
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(inputs.to(device, getattr(torch, precision)))

    return ChatModel(model, path, make_inputs, has_processor=True)


def _make_random(name: str, device: torch.device, dtype: torch.dtype, images: Images, text_tokens: int) -> ChatModel:
    size_name, kind = RANDOM_CHATS[name]
    size = replace(SIZES[size_name], dtype=dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        decoder = make_decoder(size, device)
        model: Any
        if kind == "patches":
            model, side = join_stock_llava(size, decoder, device), size.clip["image_size"]
        else:
            model, side = join_sparseformer(size, decoder, device), size.image_size
    model.eval().model.multi_modal_projector.to(dtype)
    image_token = size.llama["vocab_size"] - 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

    def make_inputs(batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(image_token, (batch, text_tokens), generator=generator)
        visual = torch.full((batch, count_visual_tokens(size, kind)), image_token)
        input_ids = torch.cat([visual, text], dim=1).to(device)
        pixels = images.pixels(batch, ImageSize(side, side))
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": ((pixels / 255 - mean) / std).to(device, dtype),
        }

    return ChatModel(model, RANDOM, make_inputs, has_processor=False)
