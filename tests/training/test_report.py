import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch
import yaml

from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap import __main__ as bootstrap
from sf_mllm.training.bootstrap.region_snapshots import RegionSnapshot, save_snapshot
from sf_mllm.training.report import __main__ as report
from sf_mllm.training.report.data import TaskFigures, differing_settings, read_runs
from sf_mllm.training.report.figures import INK, Line, Panel, draw_svg
from sf_mllm.training.report.panels import make_sections
from sf_mllm.training.report.write import write_report

TEACHER = {"swap": 0.96, "relation": 0.52}


def evaluation(step, swap):
    row = {"step": step, "eval_embedding_cosine": 0.5 + step / 100, "eval_roi_center_spread": 0.1}
    row |= {"eval_roi_points_outside": 0.25, "eval_roi_points_outside_0": 0.5, "eval_roi_points_outside_1": 0.0}
    for task, accuracy in (("swap", swap), ("relation", 0.5)):
        row |= {
            f"eval_{task}_accuracy": accuracy,
            f"eval_{task}_teacher_accuracy": TEACHER[task],
            f"eval_{task}_chance": 0.5,
            f"eval_{task}_samples": 100,
        }
    return row | {"eval_swap_retention": swap / 0.96, "eval_mean_retention": swap / 0.96}


@pytest.fixture
def make_run(tmp_path):
    def make(name, *, tokens=1.0, snapshots=(10, 20), last_line=""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {"output_dir": str(folder), "loss": {"tokens": tokens, "embedding": 1.0}, "train": {}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "run.json").write_text(json.dumps({"outcome": "complete", "parameters": 1234567, "epochs": None}))
        rows = [
            {"step": 5, "loss": 2.0, "loss_tokens": 1.5, "learning_rate": 1e-3, "samples_per_s": 7.0},
            evaluation(10, swap=0.6),
            {"step": 15, "loss": 1.0, "loss_tokens": 0.5, "learning_rate": 1e-4, "samples_per_s": 9.0},
            evaluation(20, swap=0.3),
            evaluation(20, swap=0.9312),  # taken again after a resume
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + last_line)
        for step in snapshots:
            pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
            save_snapshot(folder, RegionSnapshot(step, pixels, torch.rand(8, 4, 4)))
        return folder

    return make


class Page(HTMLParser):
    """The rows of all tables, and the tags that name other files."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.tags, self.is_in_cell = [], [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_in_cell = True

    def handle_endtag(self, tag):
        self.is_in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.is_in_cell:
            self.rows[-1][-1] += data


def test_the_page_of_a_run_holds_all_it_shows(make_run, tmp_path, capsys):
    out = tmp_path / "out" / "report.html"
    assert report.main([str(make_run("run", last_line='{"step": 2')), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links) and len(page.links) == 16
    assert "after step 10" in text and "after step 20" in text
    assert ["swap", "50.0", "100", "96.0 ± 2.0", "93.1 ± 2.5", "97.00"] in page.rows
    assert ["relation", "50.0", "100", "52.0 ± 5.0", "50.0 ± 5.0", "n/a"] in page.rows  # the teacher guesses
    assert ["mean", "", "", "", "", "97.00"] in page.rows
    assert ["parameters of the student", "1,234,567"] in page.rows and ["epochs", "n/a"] in page.rows
    assert ["sampling points outside the image, %", "25.00"] in page.rows
    assert ["loss.tokens", "1.0"] in page.rows
    assert page.tags.count("svg") == sum(
        len(panels) for panels in make_sections(read_runs([tmp_path / "run"])).values()
    )


def test_runs_are_compared(make_run, tmp_path):
    runs = read_runs([make_run("a/run", tokens=1.0), make_run("b/run", tokens=2.5, snapshots=())])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert differing_settings(runs) == ["loss.tokens"]
    write_report([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "out.html")
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert ["loss.tokens", "1.0", "2.5"] in page.rows and len(page.links) == 4
    figures = ["100", "96.0 ± 2.0", "93.1 ± 2.5", "97.00"]
    assert ["swap", "50.0", *figures, *figures] in page.rows
    panels = {panel.title: panel for panels in make_sections(runs).values() for panel in panels}
    assert [line.label for line in panels["Loss: tokens"].lines] == ["a/run", "b/run"]
    assert panels["Loss: tokens"].lines[0].color != panels["Loss: tokens"].lines[1].color


def test_curves_are_those_of_the_log(make_run):
    (run,) = read_runs([make_run("run")])
    assert run.final_tasks() == [
        TaskFigures("swap", 0.9312, 0.96, 0.5, 100, 0.9312 / 0.96),
        TaskFigures("relation", 0.5, 0.52, 0.5, 100, None),
    ]
    sections = make_sections([run])
    assert list(sections) == [
        "What the student kept",
        "Regions",
        "Losses, and agreement with the teacher on held-out images",
        "Training",
    ]
    panels = {panel.title: panel for panels in sections.values() for panel in panels}
    swap = {line.label: line for line in panels["Accuracy: swap"].lines}
    assert swap["student"].curve == ([10, 20], [0.6, 0.9312])
    assert (swap["teacher"].level, swap["teacher"].style, swap["chance"].level) == (0.96, ":", 0.5)
    retention = {line.label: line for line in panels["Retention: student / teacher"].lines}
    assert retention.keys() == {"", "swap", "mean"}
    assert panels["Retention: student / teacher, closer"].low == 0.95
    assert {line.label: line.curve for line in panels["Loss"].lines} == {
        "total": ([5, 15], [2.0, 1.0]),
        "tokens": ([5, 15], [1.5, 0.5]),
    }
    outside = {line.label: line.curve[1][-1] for line in panels["Sampling points outside"].lines}
    assert outside == {"all": 0.25, "sampling 0": 0.5, "sampling 1": 0.0}
    assert "Objects covered by a small region" not in panels  # not measured


def test_a_curve_is_an_element_that_takes_the_colour_of_text():
    lines = [Line("a & b", "#123456", ([0, 10, 20], [0.1, 0.3, 0.2])), Line("level", INK, level=0.5, style=":")]
    svg = draw_svg(Panel("A title", lines, is_share=True))
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.attrib.keys() == {"viewBox"}
    texts = {"".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("text")}
    assert {"A title, %", "a & b", "level", "step", "20", "30"} <= texts
    assert "#123456" in svg and "currentColor" in svg and INK not in svg
    assert draw_svg(Panel("A title", lines, is_share=True)) == svg
    path = next(e for e in root.iter() if e.tag.endswith("path") and "#123456" in e.get("style", ""))
    points = [[float(x) for x in point] for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))]
    assert len(points) == 3
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=1e-3)
    assert points[0][1] - points[1][1] == pytest.approx(2 * (points[2][1] - points[1][1]), abs=1e-3)  # y points down


def test_what_is_no_run_is_refused(make_run, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "lacks config.yaml, run.json, metrics.jsonl" in capsys.readouterr().err
    run = make_run("run")
    with pytest.raises(InputError, match="is given twice"):
        read_runs([run, run / "."])
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{\n" + good)
    with pytest.raises(InputError, match=r"Line 1 of '.*metrics.jsonl' is not JSON"):
        read_runs([run])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has not logged anything yet"):
        read_runs([run])


def test_a_run_draws_its_report_at_its_end_and_when_it_is_complete(run_file, monkeypatch, capfd):
    command = [str(run_file), "--report", "train.max_steps=4"]
    assert bootstrap.main(command) == 0
    page = run_file.parent / "run" / "report.html"
    first = page.read_text(encoding="utf-8")
    assert "after step 4" in first and Page(first).tags.count("img") == 3  # three images are held out
    page.unlink()
    assert bootstrap.main(command) == 0
    assert page.read_text(encoding="utf-8") == first
    page.unlink()
    assert bootstrap.main([str(run_file), "train.max_steps=4"]) == 0 and not page.exists()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bootstrap.main([*command, f"output_dir={run_file.parent / 'other'}"]) == 2
    assert "needs matplotlib" in capfd.readouterr().err
    assert not (run_file.parent / "other").exists()  # said before anything was done
