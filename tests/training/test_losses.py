import math

import pytest
import torch
import torch.nn.functional as F

from sf_mllm.training.bootstrap.losses import (
    attraction_loss,
    average_in_rois,
    classification_loss,
    coverage_loss,
    embedding_loss,
    point_hinge_loss,
    roi_hinge_loss,
    size_hinge_loss,
    token_loss,
)


def test_embedding_loss_by_hand():
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[0.5, 0.0], [0.0, -2.0]])  # cosines 1 and -1/sqrt(2), whatever the scale
    torch.testing.assert_close(embedding_loss(student, teacher), torch.tensor([0.0, 1 + 1 / math.sqrt(2)]))


def test_classification_loss_by_hand():
    teacher = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])  # probabilities 1/4 and 3/4, 1/2 and 1/2
    student = torch.tensor([[1.0, 1.0], [7.0, 7.0]])  # 1/2 and 1/2, whatever is added to all
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    torch.testing.assert_close(
        classification_loss(student, teacher, temperature=1.0), torch.tensor([by_hand, 0.0]), atol=1e-6, rtol=1e-5
    )
    # Twice the logits at twice the temperature are the same probabilities; the loss grows by the square.
    torch.testing.assert_close(
        classification_loss(2 * student, 2 * teacher), torch.tensor([4 * by_hand, 0.0]), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1),
        classification_loss(student, teacher, temperature=1.0),
    )


def test_classification_loss_is_computed_in_single_precision():
    logits = torch.tensor([[30.0, -30.0, 0.0]], dtype=torch.bfloat16)
    loss = classification_loss(logits, logits.clone())
    assert loss.dtype == torch.float32 and loss.item() == 0.0


def test_token_loss_by_hand():
    latents = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 4.0]]])
    targets = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, 1.0]]])  # cosines 1, 0 and -1, .8
    torch.testing.assert_close(token_loss(latents, targets), torch.tensor([0.5, 1.1]))


def test_token_loss_of_half_precision_is_computed_in_single():
    latents = torch.tensor([[[1000.0, 1.0]]], dtype=torch.float16)  # the squared norm overflows fp16
    assert token_loss(latents, latents.clone()).item() == pytest.approx(0.0, abs=1e-6)


def test_average_in_rois_of_a_ramp_is_the_center_inside_the_image():
    """Pixel value = its own (x, y), so a mean over a box must read back the box's centre."""
    side = 64
    centers = (torch.arange(side) + 0.5) / side
    ramp = torch.stack(torch.meshgrid(centers, centers, indexing="xy"))[None]  # [1, (x, y), H, W]
    rois = torch.tensor(
        [
            [
                [0.25, 0.5, 0.5, 0.9],
                [0.5, 0.9, 0.25, 0.5],  # the same box, flipped
                [-0.5, 0.2, 0.6, 0.4],  # leaves the image: only the part inside counts
                [0.3, 0.3, 0.3, 0.3],  # a point
            ]
        ]
    )
    expected = torch.tensor([[[0.375, 0.7], [0.375, 0.7], [0.3, 0.3], [0.3, 0.3]]])
    torch.testing.assert_close(average_in_rois(ramp, rois), expected, atol=1e-5, rtol=0)


def test_average_in_rois_by_hand_on_a_checkerboard():
    feature_map = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    rois = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.6, 0.0, 2.0, 0.2]]])
    # 4 x 4 points read 1/8, 3/8, 5/8, 7/8 along each axis; the second box reads above and right of the last centres.
    along_x = [0.6 + 0.4 * (i + 0.5) / 4 for i in range(4)]
    right = sum(1 + min(max(2 * x - 0.5, 0), 1) for x in along_x) / 4
    torch.testing.assert_close(average_in_rois(feature_map, rois), torch.tensor([[[2.5], [right]]]))


def test_coverage_of_regions_that_tile_a_map_of_tiles():
    """Four even quarters and a region on each: little is left unexplained; one region explains the mean alone."""
    quarters = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    feature_map = quarters.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    tiles = torch.tensor([[[x, y, x + 0.3, y + 0.3] for x in (0.1, 0.6) for y in (0.1, 0.6)]])
    assert coverage_loss(feature_map, tiles).item() < 0.05
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    torch.testing.assert_close(coverage_loss(feature_map, whole), torch.ones(1), atol=1e-5, rtol=0)


def test_coverage_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(1)
    feature_map = torch.randn(2, 3, 2, 4, generator=generator)
    low = 0.6 * torch.rand(2, 5, 2, generator=generator)
    rois = torch.cat([low, low + 0.1 + 0.3 * torch.rand(2, 5, 2, generator=generator)], dim=-1)
    vectors = average_in_rois(feature_map, rois)
    expected = []
    for b in range(2):
        error, pixels = 0.0, feature_map[b].flatten(1).T
        content = (pixels - pixels.mean(dim=0)).square().sum(dim=1)
        for row in range(2):
            for column in range(4):
                x, y = (column + 0.5) / 4, (row + 0.5) / 2
                shares = []
                for x1, y1, x2, y2 in rois[b].tolist():
                    u, v = (x - (x1 + x2) / 2) / ((x2 - x1) / 4), (y - (y1 + y2) / 2) / ((y2 - y1) / 4)
                    shares.append(math.exp(-(u**2) / 2 - v**2 / 2) / ((x2 - x1) * (y2 - y1)))
                copy = sum(share * vector for share, vector in zip(shares, vectors[b], strict=True)) / sum(shares)
                error += content[4 * row + column] * (feature_map[b, :, row, column] - copy).square().sum()
        expected.append(error / content.square().sum())
    torch.testing.assert_close(coverage_loss(feature_map, rois), torch.stack(expected))


def test_coverage_draws_a_region_to_content():
    """A bright spot beside the region: the gradient moves the region's centre towards it."""
    feature_map = torch.zeros(1, 1, 16, 16)
    feature_map[..., 6:10, 10:13] = 1.0  # centre (0.72, 0.5)
    rois = torch.tensor([[[0.5, 0.4, 0.7, 0.6], [0.0, 0.0, 1.0, 1.0]]], requires_grad=True)
    coverage_loss(feature_map, rois).sum().backward()
    assert rois.grad[0, 0, 0] + rois.grad[0, 0, 2] < -0.1  # descending moves it right


def test_attraction_deals_regions_to_content_in_proportion():
    """Of three regions one goes to the content on the left and two to that on the right, which is twice as large."""
    feature_map = torch.zeros(1, 1, 12, 12)
    feature_map[..., 5:7, 1:3], feature_map[..., 4:8, 9:11] = 1.0, 1.0
    centers = torch.tensor([[[0.3, 0.5], [0.5, 0.3], [0.6, 0.7]]], requires_grad=True)
    rois = torch.cat([centers - 0.1, centers + 0.1], dim=-1)
    attraction_loss(feature_map, rois).sum().backward()
    sent_to = (centers - centers.grad * 3 / 2)[0].detach()  # the gradient of a mean over three squared distances
    content = torch.tensor([[2 / 12, 0.5], [10 / 12, 5 / 12], [10 / 12, 7 / 12]])
    torch.testing.assert_close(sent_to, content, atol=0.06, rtol=0)  # a tenth of the mass is everywhere


def test_attraction_of_an_even_image_spreads_regions_over_it():
    grid = torch.tensor([[[x, y] for y in (0.25, 0.75) for x in (0.25, 0.75)]])
    even = attraction_loss(torch.ones(1, 3, 8, 8), torch.cat([grid - 0.1, grid + 0.1], dim=-1))
    heap = torch.full((1, 4, 2), 0.1) + 0.01 * grid
    crowded = attraction_loss(torch.ones(1, 3, 8, 8), torch.cat([heap - 0.1, heap + 0.1], dim=-1))
    assert even < 1e-3 < 0.1 < crowded


def test_point_hinge_by_hand():
    first = torch.tensor([[[[-0.2, 0.5], [0.3, 1.0]]], [[[0.1, 0.2], [0.3, 0.4]]]])
    second = torch.tensor([[[[0.2, 1.4], [0.3, 0.0]]], [[[0.1, 0.2], [0.3, 0.4]]]])
    torch.testing.assert_close(point_hinge_loss((first, second)), torch.tensor([(0.22 + 0.02 + 0.42 + 0.02) / 8, 0.0]))


def test_roi_hinge_by_hand():
    rois = torch.tensor([[[-0.2, 0.0, 0.5, 1.0], [0.9, 0.1, 1.3, 1.1]], [[0.0, 0.0, 1.0, 1.0], [0.2, 0.3, 0.4, 0.5]]])
    torch.testing.assert_close(roi_hinge_loss(rois), torch.tensor([(0.2 + 0.3 + 0.1) / 8, 0.0]))


def test_roi_hinge_pulls_edges_back():
    rois = torch.tensor([[-0.2, 0.5, 1.4, 0.9]], requires_grad=True)
    roi_hinge_loss(rois).sum().backward()
    torch.testing.assert_close(rois.grad, torch.tensor([[-0.25, 0.0, 0.25, 0.0]]))


def test_size_hinge_by_hand():
    """Four regions tile the image at sides of a half; of flipped ones the size counts."""
    rois = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.6, 0.9], [0.9, 0.5, 0.5, 0.2], [-1.0, -1.0, 2.0, 2.0]]])
    torch.testing.assert_close(size_hinge_loss(rois), torch.tensor([(0.1 + 0.1 + 0.2) / 8]))


def test_size_hinge_widens_and_moves_nothing():
    rois = torch.tensor([[[0.4, 0.4, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]]], requires_grad=True)
    size_hinge_loss(rois).sum().backward()
    top_left, bottom_right = rois.grad[0, 0].chunk(2)
    assert (top_left > 0).all() and (bottom_right < 0).all()  # against the gradient: outwards
    torch.testing.assert_close(top_left, -bottom_right)
    assert not rois.grad[0, 1].any()
