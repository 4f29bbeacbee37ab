"""The page of a report: HTML that holds everything it shows."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from sf_mllm.regions import draw_boxes
from sf_mllm.training.bootstrap.region_snapshots import RegionSnapshot
from sf_mllm.training.report.data import RunData, TaskFigures, differing_settings
from sf_mllm.training.report.figures import draw_svg
from sf_mllm.training.report.panels import make_sections

_PICTURE_SIDE = 320
_ABSENT = "n/a"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6672; --line: #8884; --page: #fbfbfa; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #98a2ae; --page: #14171b; --card: #1b1f25; }
}
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
p, summary, figcaption { color: var(--soft); } p { margin: .2rem 0 .6rem; } figure { margin: 0 0 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .8rem; }
.card, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; box-sizing: border-box; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; }
.strip img { width: 100%; display: block; border-radius: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap; } th { font-weight: 600; }
th[colspan] { text-align: center; } th:first-child, td:first-child, .words td { text-align: left; }
tbody tr { border-top: 1px solid var(--line); }
.words td { white-space: normal; overflow-wrap: anywhere; } small { color: var(--soft); }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; }
.numbers b { display: block; font-size: 1.35rem; }
"""

# Entries of run.json, and metrics of the last evaluation, with the words for them.
_FACTS = {
    "outcome": "outcome",
    "steps": "steps",
    "global_batch_size": "images a step",
    "epochs": "epochs",
    "tokens_per_image": "tokens an image",
    "parameters": "parameters of the student",
    "parameters_trained": "of them trained",
    "parameters_of_teacher": "parameters of the teacher's image tower",
    "device": "device",
    "wall_time_of_last_start_s": "seconds of the last start",
    "peak_memory_gib": "peak memory, GiB",
    "unreadable_images": "unreadable images",
    "revision": "revision",
}
_MEASURES = {
    "eval_embedding_cosine": ("agreement of embeddings, cosine", 1, 4),
    "eval_tokens_cosine": ("agreement of tokens, cosine", 1, 4),
    "eval_class_agreement": ("held-out images put into the teacher's class, %", 100, 2),
    "eval_roi_center_spread": ("spread of region centres over images, image sizes", 1, 3),
    "eval_roi_area": ("area of a region, % of the image", 100, 2),
    "eval_roi_points_outside": ("sampling points outside the image, %", 100, 2),
    "eval_roi_objects_covered": ("objects covered by a region below 10 % of the image, %", 100, 2),
    "eval_roi_object_share": ("objects' share of the regions, %", 100, 1),
    "eval_roi_object_share_of_image": ("objects' share of the image, %", 100, 1),
    "loss": ("loss", 1, 4),
    "samples_per_s": ("images a second", 1, 0),
}


def make_page(runs: Sequence[RunData]) -> str:
    """Return the HTML of a report on one run, or on several side by side."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>Bootstrap: {escape(title)}</h1>", _headline(runs), _task_table(runs), _regions(runs)]
    if len(runs) > 1:
        parts.append(_settings_that_differ(runs))
    for heading, panels in make_sections(runs).items():
        cards = "".join(f'<div class="card">{draw_svg(panel)}</div>' for panel in panels)
        note = "<p>Dotted: the teacher. Loosely dotted: chance.</p>" if "kept" in heading else ""
        parts.append(f'<h2>{heading}</h2>{note}<div class="grid">{cards}</div>')
    parts += [_measure_table(runs), _fact_table(runs), *map(_all_settings, runs)]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _headline(runs: Sequence[RunData]) -> str:
    """The figures that matter most, large, for one run."""
    if len(runs) > 1:
        return ""
    run = runs[0]
    figures = [
        ("mean retention", run.last("eval_mean_retention"), "{:.1%}"),
        ("agreement of embeddings", run.last("eval_embedding_cosine"), "{:.4f}"),
        ("spread of region centres", run.last("eval_roi_center_spread"), "{:.3f}"),
        ("sampling points outside", run.last("eval_roi_points_outside"), "{:.1%}"),
        ("objects covered", run.last("eval_roi_objects_covered"), "{:.1%}"),
        ("tokens an image", run.record.get("tokens_per_image"), "{}"),
        ("images a second", run.last("samples_per_s"), "{:,.0f}"),
    ]
    cards = [f"<div><b>{form.format(value)}</b>{name}</div>" for name, value, form in figures if value is not None]
    return f'<div class="numbers">{"".join(cards)}</div>'


def _task_table(runs: Sequence[RunData]) -> str:
    figures = [{item.task: item for item in run.final_tasks()} for run in runs]
    tasks = list(dict.fromkeys(task for of_run in figures for task in of_run))
    if not tasks:
        return ""
    names = "".join(f"<th colspan=4>{escape(run.name)}</th>" for run in runs)
    names = f"<tr><th colspan=2></th>{names}</tr>" if len(runs) > 1 else ""
    columns = "<th>samples</th><th>teacher</th><th>student</th><th>retention</th>" * len(runs)
    rows = []
    for task in tasks:
        chance = next(of_run[task].chance for of_run in figures if task in of_run)
        cells = [f"<td>{escape(task)}</td><td>{100 * chance:.1f}</td>"]
        cells += [_task_cells(of_run.get(task)) for of_run in figures]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    means = "".join(
        f"<td></td><td></td><td></td><td><b>{_percent(run.last('eval_mean_retention'), 2)}</b></td>" for run in runs
    )
    return (
        "<h2>Zero-shot tasks at the last evaluation</h2><p>Accuracy in percent with its standard error; retention is "
        "student / teacher, for the tasks that the teacher knows: more than three standard errors above chance.</p>"
        f'<div class="scroll"><table><thead>{names}<tr><th>task</th><th>chance</th>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}<tr><td>mean</td><td></td>{means}</tr></tbody></table></div>"
    )


def _task_cells(figures: TaskFigures | None) -> str:
    if figures is None:
        return f"<td>{_ABSENT}</td>" * 4
    cells = [f"<td>{figures.samples:,}</td>"]
    for accuracy in (figures.teacher, figures.student):
        error = (accuracy * (1 - accuracy) / figures.samples) ** 0.5
        cells.append(f"<td>{100 * accuracy:.1f} <small>± {100 * error:.1f}</small></td>")
    return "".join([*cells, f"<td>{_percent(figures.retention, 2)}</td>"])


def _regions(runs: Sequence[RunData]) -> str:
    figures = [
        f"<figure><figcaption>{escape(run.name) if len(runs) > 1 else ''} after step {snapshot.step}</figcaption>"
        f'<div class="strip">{_pictures(snapshot, 8 if len(runs) == 1 else 4)}</div></figure>'
        for run in runs
        for snapshot in (run.snapshots if len(runs) == 1 else run.snapshots[-1:])
    ]
    if not figures:
        return ""
    return (
        "<h2>Where the encoder looks</h2><p>Its final regions on held-out images, the largest violet, the smallest "
        f"yellow.</p>{''.join(figures)}"
    )


def _pictures(snapshot: RegionSnapshot, count: int) -> str:
    elements = []
    for pixels, rois in zip(snapshot.pixel_values[:count], snapshot.rois[:count], strict=True):
        file = io.BytesIO()
        picture = draw_boxes(Image.fromarray(pixels.permute(1, 2, 0).numpy()), rois, _PICTURE_SIDE)
        picture.save(file, "JPEG", quality=90, subsampling=0)
        data = base64.b64encode(file.getvalue()).decode()
        elements.append(f'<img alt="regions over an image" src="data:image/jpeg;base64,{data}">')
    return "".join(elements)


def _settings_that_differ(runs: Sequence[RunData]) -> str:
    names = differing_settings(runs)
    if not names:
        return "<h2>Settings that differ</h2><p>None.</p>"
    rows = [[name, *(str(run.settings.get(name, _ABSENT)) for run in runs)] for name in names]
    return f"<h2>Settings that differ</h2>{_table(['', *(run.name for run in runs)], rows)}"


def _measure_table(runs: Sequence[RunData]) -> str:
    rows = []
    for metric, (words, factor, digits) in _MEASURES.items():
        values = [run.last(metric) for run in runs]
        if any(value is not None for value in values):
            rows.append([words, *(_ABSENT if value is None else f"{factor * value:,.{digits}f}" for value in values)])
    return f"<h2>Last figures</h2>{_table(['', *(run.name for run in runs)], rows)}"


def _fact_table(runs: Sequence[RunData]) -> str:
    rows = [
        [words, *(_fact(run.record.get(entry)) for run in runs)]
        for entry, words in _FACTS.items()
        if any(entry in run.record for run in runs)
    ]
    return f"<h2>Runs</h2>{_table(['', *(run.name for run in runs)], rows)}"


def _all_settings(run: RunData) -> str:
    rows = [[name, str(value)] for name, value in run.settings.items()]
    return f"<details><summary>All settings of {escape(run.name)}</summary>{_table(['', ''], rows, 'words')}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _fact(value: Any) -> str:
    if value is None:
        return _ABSENT
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _percent(share: float | None, digits: int) -> str:
    return _ABSENT if share is None else f"{100 * share:.{digits}f}"
