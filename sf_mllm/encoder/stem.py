"""Early convolution: the only part of the encoder whose cost grows with the image."""

from torch import Tensor, nn

from sf_mllm.encoder.layers import is_plain
from sf_mllm.ops.convolution import PADDING, STRIDE, convolve
from sf_mllm.ops.implementations import REFERENCE
from sf_mllm.ops.pooling import pool_and_normalise
from sf_mllm.ops.stem import apply_stem


class StemConvolution(nn.Conv2d):
    """7x7 convolution of stride 2.

    Args:
        channels: C, output channels.

    Attributes:
        kernels: see `SparseFormerModel.set_kernels`; the pooling behind it, or the whole stem, goes by them, too.
    """

    bias: nn.Parameter

    def __init__(self, channels: int) -> None:
        super().__init__(3, channels, kernel_size=7, stride=STRIDE, padding=PADDING)
        self.kernels = REFERENCE

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to [B, C, ceil(H/2), ceil(W/2)]."""
        return convolve(pixel_values, self.weight, self.bias, self.kernels)


class Stem(nn.Module):
    """7x7 convolution of stride 2, ReLU, 3x3 max-pool of stride 2, then a channel norm at each pixel.

    Args:
        channels: C, output channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = StemConvolution(channels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, C, ceil(H/4), ceil(W/4)]."""
        conv = self.conv
        if conv.kernels == REFERENCE or not is_plain(conv, StemConvolution):
            return pool_and_normalise(conv(pixel_values), conv.kernels)
        return apply_stem(pixel_values, conv.weight, conv.bias, conv.kernels)
