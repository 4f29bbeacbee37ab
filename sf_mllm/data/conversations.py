"""Instruction data as a map-style dataset: text is tokenised and images are opened when a row is asked for."""

import logging
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
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

    def check(self) -> dict[str, int]:
        """Tokenise every row once, before any training, and refuse rows that could teach nothing.

        Returns:
            Counts: rows, images, tokens, supervised tokens, rows that lose their end.

        Raises:
            InputError: after truncation some rows have no token to learn or have lost visual tokens; counted, with ids.
        """
        image_token_id: Any = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        counts = {"rows": len(self), "images": 0, "tokens": 0, "supervised_tokens": 0, "truncated_rows": 0}
        unusable = []
        for index, conversation in enumerate(self.conversations):
            whole = self.encode(index)
            encoded = whole.truncated(self.max_length)
            visual_tokens = self.image_seq_length * len(conversation.image_paths)
            if encoded.num_supervised == 0 or encoded.input_ids.count(image_token_id) != visual_tokens:
                unusable.append(conversation.id)
            counts["images"] += len(conversation.image_paths)
            counts["tokens"] += len(encoded.input_ids)
            counts["supervised_tokens"] += encoded.num_supervised
            counts["truncated_rows"] += len(whole.input_ids) > self.max_length
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
