"""Where a token looks: sampling points and RoI adjustments, both predicted in fp32."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from sf_mllm.encoder.layers import UnitLayerNorm, ZeroStartLinear
from sf_mllm.ops.roi import points_in_rois


def predict_in_fp32(tokens: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer without bias in fp32, also under autocast and in a bf16 model: it predicts coordinates.

    Args:
        tokens: [..., D].
        weight: [K, D].

    Returns:
        [..., K], fp32.
    """
    with _autocast_off(tokens.device.type):
        if _can_sum_in_fp32(tokens, weight):
            products = torch.mm(tokens.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return products.unflatten(0, tokens.shape[:-1])
        return F.linear(tokens.float(), weight.float())


def _can_sum_in_fp32(tokens: Tensor, weight: Tensor) -> bool:
    """Whether CUDA's matrix units do the same: products of 16-bit numbers are exact in fp32, in which they are added.

    PyTorch has no gradients for that. Elsewhere fp32 copies are multiplied, on CUDA without matrix units.
    """
    return (
        tokens.is_cuda
        and torch.version.cuda is not None
        and tokens.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == tokens.dtype
        and not (torch.is_grad_enabled() and (tokens.requires_grad or weight.requires_grad))
    )


def _autocast_off(device_type: str) -> AbstractContextManager:
    # Asking `torch.amp.is_autocast_available` would break the graph of a compiled model on PyTorch 2.11.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class RoiSampler(nn.Module):
    """Places P sampling points inside each token's RoI.

    Args:
        width: D, of the tokens.
        num_points: P.
        eps: of the norm.
    """

    def __init__(self, width: int, num_points: int, eps: float) -> None:
        super().__init__()
        self.norm = UnitLayerNorm(width, eps=eps)
        self.offsets = ZeroStartLinear(width, 2 * num_points)
        self.shared_offsets = nn.Parameter(torch.zeros(num_points, 2))

    def forward(self, latents: Tensor, rois: Tensor) -> Tensor:
        """Return the points [B, N, P, 2], fp32, relative to the image, of tokens [B, N, D] with RoIs [B, N, 4]."""
        offsets = predict_in_fp32(self.norm(latents), self.offsets.weight).unflatten(-1, (-1, 2))
        return points_in_rois(rois, offsets + self.shared_offsets.float())

    def reset_parameters(self) -> None:
        """Start with a regular grid of points (x fastest) for a square P, else with uniform points."""
        num_points = len(self.shared_offsets)
        rows = math.isqrt(num_points)
        if rows**2 == num_points:
            cells = (torch.arange(rows) + 0.5) / rows - 0.5
            grid = torch.cartesian_prod(cells, cells).flip(-1)
            init.copy_(self.shared_offsets, grid)
        else:
            init.uniform_(self.shared_offsets, -0.5, 0.5)


class RoiAdjustment(nn.Module):
    """Predicts RoI deltas with a hidden layer (bootstrapped family)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = UnitLayerNorm(width, eps=eps)
        self.hidden = nn.Linear(width, width)
        self.out = ZeroStartLinear(width, 4)

    def forward(self, latents: Tensor) -> Tensor:
        """Predict [B, N, 4], fp32, from tokens [B, N, D]."""
        return predict_in_fp32(F.gelu(self.hidden(self.norm(latents))), self.out.weight)


class RoiAdjustmentV1(nn.Module):
    """Predicts RoI deltas with one linear layer (v1 family)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = UnitLayerNorm(width, eps=eps)
        self.out = ZeroStartLinear(width, 4)

    def forward(self, latents: Tensor) -> Tensor:
        """Predict [B, N, 4], fp32, from tokens [B, N, D]."""
        return predict_in_fp32(self.norm(latents), self.out.weight)


class InitialLatents(nn.Module):
    """Learned start of the latent tokens and of their RoIs.

    Args:
        num_latents: N.
        width: D of the focusing block.
        shared_embedding: one embedding for all tokens.
    """

    def __init__(self, num_latents: int, width: int, shared_embedding: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1 if shared_embedding else num_latents, width))
        self.rois = nn.Parameter(torch.empty(num_latents, 4))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return tokens [1, N, D] and RoIs [1, N, 4] (fp32): they are the same for all images."""
        times = len(self.rois) // len(self.embedding)
        # Copies, since PyTorch's trackers of modules cannot follow a view of a parameter where there are no gradients.
        return self.embedding.repeat(1, times, 1), self.rois.float()[None].clone()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]  # torch's own signature
        # `model.to(torch.bfloat16)` must not round the RoIs: eight bits are a quarter of a feature pixel.
        rois = self.rois

        def keep_rois_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_rois = tensor is rois or tensor is rois.grad
            return tensor.to(moved.device) if is_rois and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_rois_fp32, recurse)
