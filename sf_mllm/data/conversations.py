"""Instruction data as a map-style dataset: text is tokenised and images are opened when a row is asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from sf_mllm.data.chat import EncodedConversation, encode_conversation
from sf_mllm.data.messages import Conversation
from sf_mllm.errors import InputError


class ConversationDataset(Dataset):
    """Rows `{"input_ids": [T], "labels": [T], "pixel_values": [I, 3, H, W] or None}` of conversations.

    Args:
        conversations: the rows; `ChosenConversations` parses them when they are asked for.
        tokenizer: with `<image>` and a chat template.
        image_processor: the encoder's.
        image_seq_length: visual tokens of an image.
        max_length: tokens of a row; a longer one loses its end.
        lengths: tokens of each row within `max_length` where they are known, [rows], for batches of equal lengths.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        *,
        image_seq_length: int,
        max_length: int,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_seq_length = image_seq_length
        self.max_length = max_length
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = self.conversations[index]
        encoded = self.encode(conversation).truncated(self.max_length)
        images = [image.open() for image in conversation.images]
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "pixel_values": pixel_values}

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Tokenise a row in full, without its images.

        Raises:
            InputError: the chat template cannot express the conversation; the message names the row.
        """
        try:
            return encode_conversation(self.tokenizer, conversation.messages, image_seq_length=self.image_seq_length)
        except InputError as error:
            raise InputError(f"Conversation '{conversation.id}': {error}") from error
