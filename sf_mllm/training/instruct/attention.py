"""Training without cuDNN's attention, whose gradients can be NaN."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let PyTorch choose among its other implementations, on CUDA.

    Since 2.11 cuDNN is its first choice. There a masked query's gradient is NaN for certain lengths, 64 among them,
    where all scores of a row are strongly negative, as those of language models can be (pytorch/pytorch#196678).
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
