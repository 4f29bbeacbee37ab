"""Bilinear reads: a ramp image must read back its own coordinates."""

import pytest
import torch

from sf_mllm.ops.sampling import sample_points


def ramp(height: int, width: int) -> torch.Tensor:
    """Channel 0 holds the relative x of each pixel centre, channel 1 its y."""
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (17, 4)])
def test_ramp_reads_back_its_coordinates(size: tuple[int, int]) -> None:
    height, width = size
    margin = 0.5 / min(size)  # beyond the outermost pixel centres the border repeats
    points = margin + (1 - 2 * margin) * torch.rand(1, 6, 7, 2)
    torch.testing.assert_close(sample_points(ramp(height, width), points, padding_mode="border"), points)


def test_outside_reads_the_border_or_zero() -> None:
    outside = torch.tensor([[[[1.5, 0.5], [-0.5, 0.5]]]])
    features = ramp(4, 4) + 1
    border = sample_points(features, outside, padding_mode="border")
    torch.testing.assert_close(border[0, 0, :, 0], torch.tensor([1.875, 1.125]))
    assert torch.equal(sample_points(features, outside, padding_mode="zeros"), torch.zeros(1, 1, 2, 2))


def test_coordinates_are_never_rounded_to_half_precision() -> None:
    features = ramp(64, 64)
    points = torch.full((1, 1, 1, 2), 0.501)
    full = sample_points(features, points, padding_mode="border")
    half = sample_points(features.bfloat16(), points, padding_mode="border")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=2**-8, atol=0)


def test_gradients_reach_points_and_features() -> None:
    features = torch.randn(1, 2, 5, 6, requires_grad=True)
    points = (0.2 + 0.6 * torch.rand(1, 2, 3, 2)).requires_grad_()
    sample_points(features, points, padding_mode="border").square().sum().backward()
    assert features.grad.abs().sum() > 0 and points.grad.abs().min() > 0


def test_an_implementation_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="Implementation 'cuda' is not loaded; there is: 'torch'"):
        sample_points(ramp(4, 4), torch.rand(1, 2, 3, 2), padding_mode="border", implementation="cuda")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_points_that_are_nowhere_touch_no_other_memory(value: float) -> None:
    features = torch.randn(1, 8, 4, 4, requires_grad=True)
    points = torch.full((1, 3, 40, 2), value, requires_grad=True)
    sampled = sample_points(features, points, padding_mode="border")
    corner = features[..., -1, -1] if value > 0 else features[..., 0, 0]
    assert torch.equal(sampled, corner[:, None, None].expand_as(sampled))
    sampled.sum().backward()
    assert features.grad.sum() == sampled.numel() and not points.grad.any()


@pytest.mark.parametrize("shape", [(1, 2, 3, 3), (2, 2, 3, 2)])
def test_shapes_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch size"):
        sample_points(ramp(4, 4), torch.rand(shape), padding_mode="border")
