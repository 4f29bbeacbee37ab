"""Data of `eval.compare_encoders`: conversations as tensors, and the frozen towers' tokens of every image.

All variants of a seed see the same conversations in the same order, cut at the same word: the visual tokens, of which
each variant has another number, are put in afterwards.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from eval.compare_parts import Tower
from sf_mllm.constants import IGNORE_INDEX, IMAGE_TOKEN
from sf_mllm.data.chat import encode_conversation
from sf_mllm.data.messages import Message
from sf_mllm.data.scenes.export import question_rng
from sf_mllm.data.scenes.language import objects_of
from sf_mllm.data.scenes.questions import ask_questions
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes

TRAINING_SEED = 1
"""Seed of the training scenes, as in scripts/demo/make_demo_model.sh."""
VALIDATION_SCENES = 512
"""Scenes of that seed, behind the training scenes, for a loss that chooses between settings of a variant."""

_TURNS = 6
_CHUNK = 1000  # conversations a process makes at once
_IMAGES_AT_ONCE = 512


@dataclass(frozen=True)
class Texts:
    """One conversation a scene, [S, L] each, padded on the right; an image is a single placeholder."""

    input_ids: Tensor
    labels: Tensor

    def rows(self, rows: slice) -> "Texts":
        """Return some of the conversations."""
        return Texts(self.input_ids[rows], self.labels[rows])


def make_texts(
    tokenizer: PreTrainedTokenizerBase,
    domain: str,
    count: int,
    *,
    with_images: bool,
    max_length: int,
    workers: int,
    file: Path,
) -> Texts:
    """Make and tokenise the conversations about the training scenes 0 .. count - 1, or read them if they are there.

    Args:
        tokenizer: the decoder's.
        domain: of the scenes.
        count: of the scenes.
        with_images: start each conversation with an image.
        max_length: tokens; longer conversations lose their end.
        workers: processes.
        file: where they are kept.
    """
    if not file.is_file():
        encode = functools.partial(_encode_chunk, tokenizer, domain, with_images, max_length)
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        if workers == 1 or len(chunks) == 1:
            parts = [encode(chunk) for chunk in chunks]
        else:  # spawn: forking a process that has started torch's threads can hang
            with ProcessPoolExecutor(
                workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                parts = list(pool.map(encode, chunks))
        ids, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        longest = int((ids != tokenizer.pad_token_id).any(axis=0).nonzero()[0][-1]) + 1
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        tensors = {"input_ids": ids[:, :longest], "labels": labels[:, :longest]}
        save_file({name: torch.from_numpy(values.copy()) for name, values in tensors.items()}, temporary)
        temporary.replace(file)
    return Texts(**load_file(file))


def scene_conversations(domain: str, indices: Sequence[int], *, with_images: bool) -> Iterator[list[Message]]:
    """Yield the conversation about each training scene; `with_images` makes it start with an image."""
    scenes = sample_scenes(torch.tensor(list(indices)), ScenesConfig(seed=TRAINING_SEED, domain=domain))
    for index, objects in zip(indices, objects_of(scenes), strict=True):
        messages: list[Message] = []
        for item in ask_questions(objects, question_rng(TRAINING_SEED, index), _TURNS):
            prefix = f"{IMAGE_TOKEN}\n" if with_images and not messages else ""
            messages += [Message("user", prefix + item.question), Message("assistant", item.answer)]
        yield messages


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, domain: str, with_images: bool, max_length: int, indices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return arrays, not tensors: between processes each tensor would hold a file open."""
    input_ids = np.full((len(indices), max_length), tokenizer.pad_token_id, dtype=np.int32)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for row, messages in enumerate(scene_conversations(domain, indices, with_images=with_images)):
        encoded = encode_conversation(tokenizer, messages, image_seq_length=1).truncated(max_length)
        input_ids[row, : len(encoded.input_ids)] = encoded.input_ids
        labels[row, : len(encoded.labels)] = encoded.labels
    return input_ids, labels


class TensorConversations(Dataset):
    """Conversations whose images a tower has seen already; a batch is one indexing operation on the device.

    Padding needs no mask: it is on the right, where attention does not look.

    Args:
        texts: of S scenes.
        features: [S, N, D], the tower's tokens; None without images.
        image_token_id: the placeholder's.
        num_tokens: visual tokens that take its place.
        device: where `texts` go.
    """

    def __init__(
        self, texts: Texts, features: Tensor | None, *, image_token_id: int, num_tokens: int, device: torch.device
    ) -> None:
        self.input_ids, self.labels = (values.to(device) for values in (texts.input_ids, texts.labels))
        self.features = features
        if features is not None:
            column = int((self.input_ids[0] == image_token_id).nonzero()[0])
            assert (self.input_ids[:, column] == image_token_id).all()  # the chat template's, so the same in all rows
            self.input_ids = _widen(self.input_ids, column, num_tokens, image_token_id)
            self.labels = _widen(self.labels, column, num_tokens, IGNORE_INDEX)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch (PyTorch's fetcher asks for it in one call), on the device."""
        rows = torch.tensor(indices, device=self.input_ids.device)
        batch = {"input_ids": self.input_ids[rows].long(), "labels": self.labels[rows].long()}
        if self.features is not None:
            batch["pixel_values"] = self.features[rows]
        return batch


def _widen(values: Tensor, column: int, times: int, value: int) -> Tensor:
    """[S, L] -> [S, L - 1 + times]: a column is replaced by `times` columns of a value."""
    return torch.cat((values[:, :column], values.new_full((len(values), times), value), values[:, column + 1 :]), dim=1)


def render_scenes(domain: str, seed: int, indices: Sequence[int], image_size: int, device: torch.device) -> Tensor:
    """Draw scenes of a domain and a seed: [B, 3, image_size, image_size] uint8."""
    scenes = sample_scenes(torch.tensor(list(indices), device=device), ScenesConfig(seed=seed, domain=domain))
    return render(scenes, image_size)


@torch.no_grad()
def encode_scenes(tower: Tower, domain: str, seed: int, count: int, *, image_size: int, device: torch.device) -> Tensor:
    """Let a frozen tower see the scenes 0 .. count - 1 of a seed, in the precision in which it would while training.

    Args:
        tower: its module on the device.
        domain: of the scenes.
        seed: of the scenes.
        count: of the scenes.
        image_size: side in pixels.
        device: where to work and to keep the tokens.

    Returns:
        [count, N, D]; float16 on a GPU, whose training rounds more (bfloat16), else float32.
    """
    is_cuda = device.type == "cuda"
    features = torch.empty(
        (count, tower.num_tokens, tower.width), dtype=torch.float16 if is_cuda else torch.float32, device=device
    )
    for start in range(0, count, _IMAGES_AT_ONCE):
        indices = range(start, min(start + _IMAGES_AT_ONCE, count))
        pixel_values = tower.prepare(render_scenes(domain, seed, indices, image_size, device))
        with torch.autocast(device.type, torch.bfloat16, enabled=is_cuda):
            features[start : indices.stop] = tower.module(pixel_values)
    return features
