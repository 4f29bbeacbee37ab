"""Early convolution: the only part of the encoder whose cost grows with the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sf_mllm.ops.convolution import PADDING, STRIDE, convolve
from sf_mllm.ops.implementations import REFERENCE


class StemConvolution(nn.Conv2d):
    """7x7 convolution of stride 2.

    Args:
        channels: C, output channels.

    Attributes:
        kernels: see `SparseFormerModel.set_kernels`.
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
        features = F.max_pool2d(F.relu(self.conv(pixel_values)), kernel_size=3, stride=2, padding=1)
        return normalise_channels(features)


def normalise_channels(features: Tensor) -> Tensor:
    """Layer norm without parameters over the channel axis of [B, C, H, W]; eps 1e-5, biased variance, in fp32."""
    full = features.float()
    variance, mean = torch.var_mean(full, dim=1, correction=0, keepdim=True)
    return ((full - mean) * torch.rsqrt(variance + 1e-5)).to(features.dtype)
