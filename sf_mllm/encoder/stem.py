"""Early convolution: the only part of the encoder whose cost grows with the image."""

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
        # The largest value is the same before and after ReLU, which has a quarter of the work when it comes second.
        features = F.relu(F.max_pool2d(self.conv(pixel_values), kernel_size=3, stride=2, padding=1))
        return normalise_channels(features)


def normalise_channels(features: Tensor) -> Tensor:
    """Layer norm without parameters over the channel axis of [B, C, H, W]; eps 1e-5, biased variance, in fp32."""
    pixels = features.float().permute(0, 2, 3, 1)
    normalised = F.layer_norm(pixels, pixels.shape[-1:], eps=1e-5)
    return normalised.permute(0, 3, 1, 2).to(features.dtype)
