"""Instruction data as a map-style dataset: text is tokenised and images are opened when a row is asked for."""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.data.chat import EncodedConversation, encode_conversation
from sf_mllm.data.image_io import open_image
from sf_mllm.data.messages import Conversation
from sf_mllm.errors import InputError

logger = logging.getLogger(__name__)

_SHOWN_IDS = 5


class ConversationDataset(Dataset):
    """Rows `{"input_ids": [T], "labels": [T], "pixel_values": [I, 3, H, W] or None}` of conversations.

    A row longer than `max_length` loses its end.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        *,
        image_seq_length: int,
        max_length: int,
    ) -> None:
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_seq_length = image_seq_length
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = self.conversations[index]
        encoded = self.encode(index).truncated(self.max_length)
        images = [open_image(path) for path in conversation.image_paths]
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "pixel_values": pixel_values}

    def encode(self, index: int) -> EncodedConversation:
        """Tokenise one row in full, without its images.

        Raises:
            InputError: the chat template cannot express the conversation; the message names the row.
        """
        conversation = self.conversations[index]
        try:
            return encode_conversation(self.tokenizer, conversation.messages, image_seq_length=self.image_seq_length)
        except InputError as error:
            raise InputError(f"Conversation '{conversation.id}': {error}") from error

    def check(self, workers: int = 0) -> dict[str, int]:
        """Tokenise every row once, before any training, and refuse rows that could teach nothing.

        Args:
            workers: processes that tokenise; 0 does it in this one.

        Returns:
            Counts: rows, images, tokens, supervised tokens, rows that lose their end.

        Raises:
            InputError: after truncation some rows have no token to learn or have lost visual tokens; counted, with ids.
        """
        counts = {"rows": len(self), "images": 0, "tokens": 0, "supervised_tokens": 0, "truncated_rows": 0}
        unusable = []
        loader = DataLoader(_Measured(self), batch_size=64, num_workers=workers, collate_fn=list)
        for conversation, row in zip(self.conversations, chain.from_iterable(loader), strict=True):
            num_images = len(conversation.image_paths)
            if row.supervised_tokens == 0 or row.visual_tokens != num_images * self.image_seq_length:
                unusable.append(conversation.id)
            counts["images"] += num_images
            counts["tokens"] += row.tokens
            counts["supervised_tokens"] += row.supervised_tokens
            counts["truncated_rows"] += row.is_truncated
        if unusable:
            ids = ", ".join(unusable[:_SHOWN_IDS]) + (", ..." if len(unusable) > _SHOWN_IDS else "")
            raise InputError(
                f"{len(unusable)} of {len(self)} conversations keep no answer or not all visual tokens within "
                f"max_length={self.max_length} tokens (ids {ids}); raise max_length or remove them."
            )
        if counts["truncated_rows"]:
            logger.warning(
                "%d of %d conversations lose their end at max_length=%d.",
                counts["truncated_rows"],
                len(self),
                self.max_length,
            )
        return counts


class _RowSize(NamedTuple):
    """What is left of a row within the maximum length."""

    tokens: int
    supervised_tokens: int
    visual_tokens: int
    is_truncated: bool


class _Measured(Dataset):
    """The sizes of a dataset's rows; no image is opened."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset
        self.image_token_id: Any = dataset.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _RowSize:
        whole = self.dataset.encode(index)
        kept = whole.truncated(self.dataset.max_length)
        return _RowSize(
            tokens=len(kept.input_ids),
            supervised_tokens=kept.num_supervised,
            visual_tokens=kept.input_ids.count(self.image_token_id),
            is_truncated=len(whole.input_ids) > len(kept.input_ids),
        )
