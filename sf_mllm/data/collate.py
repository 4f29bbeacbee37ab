"""Encoded conversations to batches: pad and stack, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sf_mllm.constants import IGNORE_INDEX


@dataclass
class ConversationCollator:
    """Makes `input_ids`, `attention_mask`, `labels` [B, T] and, if any row has images, `pixel_values` [I, 3, H, W].

    Rows are padded on the right: training has no cache, so no row has to end where the others do.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of `ConversationDataset`.

        Raises:
            ValueError: images differ in size.
        """
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        images = [row["pixel_values"] for row in rows if row["pixel_values"] is not None]
        if images:
            sizes = {tuple(image.shape[1:]) for image in images}
            if len(sizes) > 1:
                raise ValueError(
                    f"Images of one batch must have one size, got {sorted(sizes)}; "
                    "let the image processor crop or resize to a fixed size."
                )
            batch["pixel_values"] = torch.cat(images)
        return batch
