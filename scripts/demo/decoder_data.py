"""What the demo decoder learns from: conversations about scenes, with a text in the place of the image."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sf_mllm.constants import IGNORE_INDEX, IMAGE_TOKEN
from sf_mllm.data.chat import accept_image_content, encode_conversation
from sf_mllm.data.messages import Message
from sf_mllm.data.scene_language import describe_for_reading, objects_of
from sf_mllm.data.scene_questions import ask_questions
from sf_mllm.data.scene_sampling import ScenesConfig, sample_scenes
from sf_mllm.data.scenes import question_rng

VOCABULARY_SIZE = 512
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this small model knows user and assistant turns only') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TURNS = 6
_CHUNK = 2000  # conversations a process makes at once


def scene_conversations(indices: Sequence[int], seed: int) -> Iterator[list[Message]]:
    """Yield one conversation a scene, of several turns; the first question follows a text that describes the scene."""
    for index, objects in zip(
        indices, objects_of(sample_scenes(torch.tensor(list(indices)), ScenesConfig(seed=seed))), strict=True
    ):
        rng = question_rng(seed, index)
        messages = []
        for item in ask_questions(objects, rng, _TURNS):
            messages += [Message("user", item.question), Message("assistant", item.answer)]
        messages[0] = Message("user", f"{describe_for_reading(objects, rng)}\n{messages[0].text}")
        yield messages


def train_tokenizer(seed: int, conversations: int = 4000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can write any text but is short on scenes."""
    core = Tokenizer(models.BPE())
    # A space goes before each turn, so that a word is the same token at the start of an answer and inside a text.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, USER, ASSISTANT, END, IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (m.text for messages in scene_conversations(range(conversations), seed) for m in messages)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, IMAGE_TOKEN],
        chat_template=accept_image_content(CHAT_TEMPLATE),
        model_max_length=2048,
    )


class EncodedScenes(Dataset):
    """Conversations as two tensors, so that a batch is one indexing operation and the GPU never waits.

    Attributes:
        input_ids: [N, L] int16, padded on the right; with causal attention the padding needs no mask.
        labels: [N, L] int16.
    """

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids = input_ids
        self.labels = labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch (PyTorch's fetcher asks for it in one call): int64 [B, L] each."""
        return {"input_ids": self.input_ids[indices].long(), "labels": self.labels[indices].long()}


def encode_scenes(
    tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int, max_length: int, workers: int
) -> EncodedScenes:
    """Make and tokenise the conversations about scenes 0 .. count - 1, each cut to `max_length` tokens."""
    encode = functools.partial(_encode_chunk, tokenizer, seed, max_length)
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    if workers == 1:
        parts = [encode(chunk) for chunk in chunks]
    else:  # spawn: forking a process that has started torch's threads can hang
        with ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            parts = list(pool.map(encode, chunks))
    ids, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    return EncodedScenes(ids, labels)


def _encode_chunk(
    tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int, indices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return arrays, not tensors: between processes each tensor would hold a file open."""
    input_ids = np.full((len(indices), max_length), tokenizer.pad_token_id, dtype=np.int16)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for row, messages in enumerate(scene_conversations(indices, seed)):
        encoded = encode_conversation(tokenizer, messages, image_seq_length=1).truncated(max_length)
        input_ids[row, : len(encoded.input_ids)] = encoded.input_ids
        labels[row, : len(encoded.labels)] = encoded.labels
    return input_ids, labels
