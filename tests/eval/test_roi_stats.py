import csv

from eval.roi_stats import main


def test_the_command_writes_rows(saved_model, tmp_path, capsys):
    assert main([str(saved_model), "--samples", "4", "--rows", str(tmp_path)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    with (tmp_path / "roi_stats.csv").open() as file:
        rows = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert rows.keys() == printed.keys() and 0 < rows["roi_object_share_of_image"] < 0.5
    assert {row.split(",")[1] for row in (tmp_path / "roi_stats.csv").read_text().splitlines()[1:]} == {"scenes-rois-2"}
    assert main([str(saved_model), "--samples", "4", "--tasks", "clutter", "--rows", str(tmp_path)]) == 0
    assert "clutter-rois-2" in (tmp_path / "roi_stats.csv").read_text()
    assert main([str(saved_model), "--samples", "1"]) == 2
    assert main([str(saved_model), "--tasks", "clouds"]) == 2
    assert "--tasks takes: scenes, clutter" in capsys.readouterr().err
