"""Box algebra against hand-computed values."""

import math

import pytest
import torch

from sf_mllm.ops.roi import adjust_rois, distinct_grid, official_grid, points_in_rois


def test_official_grid_has_x_as_the_slow_index() -> None:
    grid = official_grid(9)
    assert torch.equal(grid[0], torch.tensor([0.0, 0.0, 0.5, 0.5]))
    assert torch.equal(grid[1], torch.tensor([0.0, 0.25, 0.5, 0.75]))  # below token 0, not to its right
    assert torch.equal(grid[8], torch.tensor([0.5, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize(("num_latents", "left_over"), [(12, 3), (48, 12), (63, 14)])
def test_official_left_overs_see_the_whole_image(num_latents: int, left_over: int) -> None:
    grid = official_grid(num_latents)
    assert grid.shape == (num_latents, 4)
    assert torch.equal(grid[-left_over:], torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(left_over, 4))


def test_official_grid_needs_four() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        official_grid(3)


@pytest.mark.parametrize("num_latents", range(1, 82))
def test_distinct_grid_has_no_twins_and_stays_inside(num_latents: int) -> None:
    grid = distinct_grid(num_latents)
    assert grid.shape == (num_latents, 4)
    assert len(torch.unique(grid, dim=0)) == num_latents
    assert grid.min() >= 0 and grid.max() <= 1
    if math.isqrt(num_latents) ** 2 == num_latents and num_latents >= 4:
        assert torch.equal(grid, official_grid(num_latents))


def test_adjustment_by_hand() -> None:
    box = torch.tensor([0.2, 0.4, 0.6, 0.6])
    deltas = torch.tensor([0.5, -1.0, math.log(2.0), 0.0])
    # centre (0.4, 0.5) + (0.2, -0.2), size (0.8, 0.2)
    torch.testing.assert_close(adjust_rois(box, deltas), torch.tensor([0.2, 0.2, 1.0, 0.4]))


def test_zero_adjustment_straightens_a_flipped_box_and_keeps_others() -> None:
    boxes = torch.tensor([[0.6, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])
    straight = torch.tensor([[0.2, 0.1, 0.6, 0.3], [0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(adjust_rois(boxes, torch.zeros(2, 4)), straight)


def test_points_depend_on_the_shape_of_the_offsets_only() -> None:
    boxes = torch.rand(2, 3, 4)
    offsets = torch.randn(2, 3, 7, 2)
    # The small constant beside the deviation breaks exact scale invariance.
    torch.testing.assert_close(
        points_in_rois(boxes, offsets), points_in_rois(boxes, 5 * offsets + 3), rtol=1e-4, atol=1e-4
    )


def test_points_have_a_third_of_the_box_as_deviation_and_its_centre_as_mean() -> None:
    box = torch.tensor([0.2, 0.4, 0.6, 0.5], dtype=torch.float64)
    points = points_in_rois(box, torch.randn(9, 2, dtype=torch.float64))
    torch.testing.assert_close(points.mean(0), torch.tensor([0.4, 0.45], dtype=torch.float64))
    spread = torch.tensor([0.4, 0.1], dtype=torch.float64) / 3
    torch.testing.assert_close(points.std(0), spread, rtol=1e-4, atol=0)


def test_points_of_a_flipped_box_are_mirrored() -> None:
    box = torch.tensor([0.2, 0.1, 0.6, 0.5])
    flipped = torch.tensor([0.6, 0.1, 0.2, 0.5])
    offsets = torch.randn(4, 2)
    points, mirrored = points_in_rois(box, offsets), points_in_rois(flipped, offsets)
    torch.testing.assert_close(points[:, 1], mirrored[:, 1])
    torch.testing.assert_close(points[:, 0] - 0.4, 0.4 - mirrored[:, 0])


def test_gradients() -> None:
    boxes = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    deltas = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adjust_rois, (boxes, deltas))
    assert torch.autograd.gradcheck(points_in_rois, (boxes, offsets))
