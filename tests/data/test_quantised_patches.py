import pytest
import torch
import torch.nn.functional as F

from sf_mllm.data.quantised_patches import dequantise, quantise, rounding_error


@pytest.mark.parametrize(
    ("outliers", "limit"),
    [(1.0, 0.010), (10.0, 0.05)],
    ids=["like a normal distribution", "ten times larger channels"],
)
def test_rounding_error_is_as_stated(outliers, limit):
    torch.manual_seed(0)
    feature_map = torch.randn(4, 512, 14, 14)
    feature_map[:, ::128] *= outliers
    pooled = F.avg_pool2d(feature_map, 2)
    patches, scales = quantise(feature_map, 7)
    assert (patches.dtype, patches.shape, scales.dtype, scales.shape) == (
        torch.int8, (4, 7, 7, 512), torch.float16, (4, 7, 7),
    )  # fmt: skip
    restored = dequantise(patches, scales)
    error = (restored - pooled).norm(dim=1) / pooled.norm(dim=1)
    expected = pooled.abs().amax(dim=1) / (127 * 12**0.5 * pooled.square().mean(dim=1).sqrt())
    torch.testing.assert_close(error, expected, rtol=0.15, atol=0)
    assert error.max() < limit
    assert F.cosine_similarity(restored, pooled, dim=1).min() > 1 - limit**2


def test_cells_are_averaged_by_area():
    """As if each of 5 patches in a row were cut into 3, so that 15 parts fall into 3 cells of 5."""
    feature_map = torch.randn(2, 64, 5, 5)
    parts = feature_map.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    patches, scales = quantise(feature_map, 3)
    expected = F.avg_pool2d(parts, 5)
    assert (dequantise(patches, scales) - expected).abs().max() < 0.51 * scales.max()
    assert rounding_error(feature_map, patches, scales) == pytest.approx(
        ((dequantise(patches, scales) - expected).norm(dim=1) / expected.norm(dim=1)).mean().item(), rel=1e-3
    )


def test_a_map_of_zeros_and_a_map_of_the_grid_s_size():
    zeros = torch.zeros(1, 5, 3, 3)
    torch.testing.assert_close(dequantise(*quantise(zeros, 3)), zeros)
    whole_numbers = torch.randint(-127, 128, (1, 50, 3, 3)).float()
    whole_numbers[:, 0] = 127
    torch.testing.assert_close(dequantise(*quantise(whole_numbers, 3)), whole_numbers)
