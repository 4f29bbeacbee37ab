import pytest
import torch

from sf_mllm.data.scenes.domains import UNIT
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes
from sf_mllm.encoder.modeling_sparseformer import SparseFormerOutput
from sf_mllm.training.bootstrap.roi_statistics import (
    SCENES_SEED,
    describe_rois,
    draw_objects,
    is_in_small_roi,
    measure_on_scenes,
)


def test_statistics_by_hand():
    rois = torch.tensor([[[0.0, 0.0, 0.5, 0.5]], [[0.5, 0.0, 1.5, 0.5]]])  # the second leaves the image by half
    points = (
        torch.tensor([[[[0.1, 0.1], [0.2, 1.2]]], [[[0.9, 0.9], [0.5, 0.5]]]]),
        torch.tensor([[[[0.1, -0.1], [0.2, 1.2]]], [[[0.9, 0.9], [1.5, 0.5]]]]),
    )
    numbers = describe_rois(rois, points)
    assert numbers["roi_area"] == pytest.approx(0.25)
    # centres x .25 and 1.0, y .25 and .25: standard deviations .75 / sqrt(2) and 0
    assert numbers["roi_center_spread"] == pytest.approx(0.75 / 2**0.5 / 2)
    outside = [numbers[f"roi_points_outside{suffix}"] for suffix in ("_0", "_1", "")]
    assert outside == pytest.approx([0.25, 0.75, 0.5])


def test_regions_that_ignore_the_image_have_no_spread():
    rois = torch.rand(1, 6, 4).expand(3, 6, 4)
    assert describe_rois(rois, (torch.zeros(3, 6, 4, 2),))["roi_center_spread"] == 0


def test_only_small_regions_count():
    points = torch.tensor([[[0.1, 0.1], [0.5, 0.5], [0.9, 0.1]]])
    rois = torch.tensor([[[0.0, 0.0, 0.2, 0.2], [0.0, 0.0, 1.0, 1.0], [1.2, 0.2, 0.8, 0.0]]])  # the last one flipped
    assert is_in_small_roi(points, rois).tolist() == [[True, False, True]]


def test_objects_are_where_the_scene_says():
    scenes = sample_scenes(torch.arange(4), ScenesConfig(seed=1))
    mask = draw_objects(scenes, 256)
    for scene in range(4):
        for slot in range(int(scenes.count[scene])):
            column, row = (int(value[scene, slot]) * 256 // UNIT for value in (scenes.x, scenes.y))
            assert mask[scene, 0, row, column] == 1
        areas = torch.pi * (scenes.radius[scene][scenes.present[scene]] / UNIT) ** 2  # circles are disjoint
        assert mask[scene].mean().item() == pytest.approx(areas.sum().item(), rel=0.03)


def test_an_encoder_that_looks_at_every_object_covers_all_of_them_and_one_that_looks_away_none():
    scenes = sample_scenes(torch.arange(70), ScenesConfig(seed=SCENES_SEED))
    centers = torch.stack([scenes.x, scenes.y], dim=-1) / UNIT
    half = 0.7 * scenes.radius[..., None] / UNIT  # almost the square inside the circle
    on_objects = torch.cat([centers - half, centers + half], dim=-1)  # [70, 8, 4]
    at_edge = torch.tensor([0.0, 0.0, 0.004, 0.004]).expand(70, 8, 4)  # objects keep clear of the edge

    def measure(rois):
        seen = []

        def encode(pixels):
            start = sum(seen)
            seen.append(len(pixels))
            of_chunk = rois[start : start + len(pixels)]
            points = of_chunk[..., :2].unsqueeze(2)
            return SparseFormerOutput(rois=of_chunk[:, None], sampling_points=(points,))

        return measure_on_scenes(encode, 70, image_size=224, device="cpu")

    found, missed = measure(on_objects), measure(at_edge)
    assert found["roi_objects_covered"] == 1 and missed["roi_objects_covered"] == 0
    assert missed["roi_object_share"] == 0 < found["roi_object_share_of_image"] < 0.2
    present = scenes.present.float().mean().item()  # regions of empty slots lie in a corner
    assert found["roi_object_share"] == pytest.approx(present, abs=0.02)
    assert found["roi_points_outside"] == pytest.approx(1 - present, abs=1e-6)
