import pytest
import torch

from sf_mllm.training.roi_statistics import describe_rois


def test_statistics_by_hand():
    rois = torch.tensor([[[0.0, 0.0, 0.5, 0.5]], [[0.5, 0.0, 1.5, 0.5]]])  # the second leaves the image by half
    points = (torch.tensor([[[[0.1, 0.1], [0.2, 1.2]]], [[[0.9, 0.9], [0.5, 0.5]]]]),)
    numbers = describe_rois(rois, points)
    assert numbers["roi_area"] == pytest.approx(0.25)
    # centres x .25 and 1.0, y .25 and .25: standard deviations .75 / sqrt(2) and 0
    assert numbers["roi_center_spread"] == pytest.approx(0.75 / 2**0.5 / 2)
    assert numbers["points_outside"] == pytest.approx(0.25)


def test_regions_that_ignore_the_image_have_no_spread():
    rois = torch.rand(1, 6, 4).expand(3, 6, 4)
    assert describe_rois(rois, (torch.zeros(3, 6, 4, 2),))["roi_center_spread"] == 0
