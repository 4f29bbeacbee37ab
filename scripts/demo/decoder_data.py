"""What the demo decoder learns from: conversations about scenes that are described in words, made while it trains."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.data.messages import Message
from sf_mllm.data.scenes.export import question_rng
from sf_mllm.data.scenes.language import describe_for_reading, objects_of
from sf_mllm.data.scenes.questions import QUESTION_TYPES, ask_questions
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes

if TYPE_CHECKING:  # the processes that make data need nothing else of transformers
    from transformers import PreTrainedTokenizerFast

TYPES = (*QUESTION_TYPES, "relation", "comparison", "comparison")
"""Questions that take two look-ups, and then a comparison of what was found, are learnt last: they come more often."""
_TURNS = 16  # more than fit into a row of 256 tokens, unless a scene allows fewer
_READY = 4  # batches that each process keeps ahead


@dataclass(frozen=True)
class SceneConversations:
    """Endless conversations of several turns, one a scene; the first question follows the scene in words."""

    seed: int
    domain: str = "plain"

    def read(self, indices: Tensor) -> Iterator[list[Message]]:
        """Yield the conversations about the scenes with the given indices [B]."""
        scenes = objects_of(sample_scenes(indices, ScenesConfig(seed=self.seed, domain=self.domain)))
        for index, objects in zip(indices.tolist(), scenes, strict=True):
            rng = question_rng(self.seed, index)
            messages = []
            for item in ask_questions(objects, rng, _TURNS, TYPES):
                messages += [Message("user", item.question), Message("assistant", item.answer)]
            messages[0] = Message("user", f"{describe_for_reading(objects, rng)}\n{messages[0].text}")
            yield messages


class EncodedBatches(Dataset):
    """Batches of conversations as tokens; batch i is the same whoever makes it, and no batch comes twice.

    A row holds as many turns as fit: none is cut, and few positions are padding.

    Args:
        conversations: to encode.
        tokenizer: of `train_tokenizer`; what it makes of a conversation is what `encode_conversation` would.
        batch_size: conversations in a batch.
        max_length: tokens of a row.
    """

    def __init__(
        self,
        conversations: SceneConversations,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        batch_size: int,
        max_length: int,
    ) -> None:
        self.conversations = conversations
        self.core = tokenizer.backend_tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.pad = tokenizer.pad_token_id
        self.end = tokenizer.eos_token_id
        self.roles = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant")}

    def __len__(self) -> int:
        return 2**32 // self.batch_size  # as many as there are scenes

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return the tokens and labels of a batch, [B, L] int16 each, padded on the right.

        With causal attention the padding needs no mask.
        """
        indices = torch.arange(number * self.batch_size, (number + 1) * self.batch_size)
        conversations = list(self.conversations.read(indices))
        texts = [message.text for messages in conversations for message in messages]
        encoded = iter(self.core.encode_batch(texts, add_special_tokens=False))
        input_ids = np.full((self.batch_size, self.max_length), self.pad, dtype=np.int16)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for row, messages in enumerate(conversations):
            turns = [[self.roles[message.role], *next(encoded).ids, self.end] for message in messages]
            filled = 0
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                start, stop = filled + len(question), filled + len(question) + len(answer)
                if stop > self.max_length:
                    break
                input_ids[row, filled:start] = question
                input_ids[row, start:stop] = answer
                labels[row, start + 1 : stop] = answer[1:]
                filled = stop
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def load_batches(batches: EncodedBatches, workers: int, *, pin_memory: bool) -> DataLoader:
    """Return the batches in their order, made by `workers` processes ahead of time (0: by this one, when asked)."""
    options = {}
    if workers:  # spawn: forking a process that has started torch's threads can hang
        options = {"multiprocessing_context": "spawn", "worker_init_fn": _use_one_thread, "prefetch_factor": _READY}
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory, **options)


def _use_one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
