"""Training without cuDNN's attention, which can compute NaN."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let PyTorch choose among its other implementations, on CUDA.

    Since 2.11 cuDNN is its first choice. There a masked query's gradient is NaN for certain lengths, 64 among them,
    where all scores of a row are strongly negative, as those of language models can be (pytorch/pytorch#196678). The
    output of a frozen ViT was NaN for a quarter of a batch, too (compiled, bf16, PyTorch 2.11, H200; in eager or in
    fp32 it was not); that cuDNN did it is a guess.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
