import csv

import pytest
import torch

from eval.roi_stats import draw_objects, is_in_small_roi, main
from sf_mllm.data.scene_sampling import UNIT, ScenesConfig, sample_scenes


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


def test_the_command_writes_rows(saved_model, tmp_path, capsys):
    assert main([str(saved_model), "--samples", "4", "--rows", str(tmp_path)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    with (tmp_path / "roi_stats.csv").open() as file:
        rows = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert rows.keys() == printed.keys() and 0 < rows["object_share_in_image"] < 0.5
    assert main([str(saved_model), "--samples", "1"]) == 2
