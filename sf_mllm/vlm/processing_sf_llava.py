"""Images and text to model inputs: each `<image>` becomes a fixed number of placeholder tokens."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.errors import InputError


class SFLlavaProcessor(ProcessorMixin):
    r"""Joins the encoder's image processor and the language model's tokenizer.

    Example:
        >>> processor(images=[image], text="<image>\nWhat is this?", return_tensors="pt")
        {"input_ids": [1, T], "attention_mask": [1, T], "pixel_values": [1, 3, H, W]}
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_seq_length: int | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None or image_processor is None or image_seq_length is None:
            raise InputError(
                "SFLlavaProcessor needs an image processor, a tokenizer and image_seq_length, the visual tokens of an "
                "image; load it from a model directory, where all three are."
            )
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise InputError(f"The tokenizer '{tokenizer.name_or_path}' has no token {IMAGE_TOKEN}; add it first.")
        tokenizer.padding_side = "left"  # generation goes on from the last position, which must not be padding
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for one image, whatever its size."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Tell serving engines how many tokens images of the given sizes take."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )
