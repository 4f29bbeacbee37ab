"""Rows as a LLaVA run sees them, for measurements of speed.

Inputs are random, not zeros: a GPU computes on zeros faster than on numbers.

The mix is that of LLaVA-1.5's second stage: 665,298 rows, of which 40,688 are text only (ShareGPT). Its lengths are not
published; they follow here from what is. The file is about 1 GB of JSON, which is 1.5 KB or some 300 text tokens a row;
text-only rows are long conversations, of which many are cut at the maximum length. So text lengths are log-normal with
a median of 160 tokens (mean 240) beside an image and of 1,000 tokens without one, drawn evenly from the distribution
and not at random, so that a few hundred rows hold the mix. Half of the text is answers.
"""

import math
from statistics import NormalDist
from typing import Any

import torch
from torch.utils.data import Dataset

from sf_mllm.bench.random_models import Size
from sf_mllm.constants import IGNORE_INDEX

MIX_ROWS = 665_298
_TEXT_ONLY_ROWS = 40_688
_TEXT_MEDIANS = {"image": 160, "text": 1000}
_TEXT_SIGMA = 0.9
_KEPT_IMAGES = 64


class MixRows(Dataset):
    """Rows of the mix as `ConversationDataset` gives them, with random tokens and images.

    Args:
        count: of rows.
        size: of the models.
        visual_tokens: of an image.
        image_size: in pixels.
    """

    def __init__(self, count: int, size: Size, *, visual_tokens: int, image_size: int) -> None:
        num_text_only = round(count * _TEXT_ONLY_ROWS / MIX_ROWS)
        self.text_lengths = [
            *_spread(count - num_text_only, _TEXT_MEDIANS["image"] * size.text_scale),
            *_spread(num_text_only, _TEXT_MEDIANS["text"] * size.text_scale),
        ]
        self.num_with_image = count - num_text_only
        self.visual_tokens = visual_tokens
        self.max_length = size.max_length
        self.image_token_id = size.llama["vocab_size"] - 1
        self.images = torch.randn(
            _KEPT_IMAGES, 1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self.text_lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [
            min(self.max_length, text + self.visual_tokens * (row < self.num_with_image))
            for row, text in enumerate(self.text_lengths)
        ]

    def __getitem__(self, row: int) -> dict[str, Any]:
        has_image = row < self.num_with_image
        text = torch.randint(
            self.image_token_id, (self.text_lengths[row],), generator=torch.Generator().manual_seed(row)
        )
        labels = text.clone()
        labels[: len(text) // 2] = IGNORE_INDEX
        if has_image:
            text = torch.cat([torch.full((self.visual_tokens,), self.image_token_id), text])
            labels = torch.cat([torch.full((self.visual_tokens,), IGNORE_INDEX), labels])
        return {
            "input_ids": text[: self.max_length],
            "labels": labels[: self.max_length],
            "pixel_values": self.images[row % _KEPT_IMAGES] if has_image else None,
        }


def _spread(count: int, median: float) -> list[int]:
    """Return lengths at evenly spaced quantiles of a log-normal distribution."""
    normal = NormalDist(math.log(median), _TEXT_SIGMA)
    return [max(2, round(math.exp(normal.inv_cdf((index + 0.5) / count)))) for index in range(count)]
