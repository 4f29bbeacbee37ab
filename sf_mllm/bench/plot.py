"""Draws measured towers: latency and images/s against tokens or accuracy, and time against the size of the image."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from sf_mllm.bench.choices import MODES, PRECISIONS
from sf_mllm.bench.encoder import STEP
from sf_mllm.bench.rows import COMPLETE
from sf_mllm.bench.tower import RANDOM
from sf_mllm.errors import InputError, nearest

_FORMATS = (".png", ".svg", ".pdf")
_CIRCUMSTANCES = ("step", "model", "weights", "visual_tokens", "width", "height", "batch", "precision", "mode")
_FIGURES = ("outcome", "time_ms", "time_ms_q25", "time_ms_q75", "images_per_s", "device", "torch")
_PANEL_IN = (4.6, 4.2)
_MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class _Point:
    """One complete row of an encoder."""

    row: dict[str, str]

    @property
    def label(self) -> str:
        notes = [self.row[name] for name in ("precision", "mode", "weights")]
        noted = [note for note in notes if note in (*PRECISIONS, *MODES, RANDOM) and note not in ("float32", "eager")]
        return self.row["model"] + (f" ({', '.join(noted)})" if noted else "")

    @property
    def megapixels(self) -> float:
        return int(self.row["width"]) * int(self.row["height"]) / 1e6

    def figure(self, column: str) -> float:
        return float(self.row[column])


def plot_rows(file: Path, out: Path | None = None, accuracy: Path | None = None) -> Path:
    """Draw the rows of encoders in a file.

    Drawn are the rows of the device that the last one names; of rows measured several times the last one counts. Where
    towers were measured at several sizes, the first two panels show each at its first one in the file.

    Args:
        file: that `--rows` has written.
        out: picture to write; None: beside the file, as PNG.
        accuracy: CSV file with the columns model and accuracy; towers are drawn against it instead of tokens.

    Returns:
        The picture.

    Raises:
        InputError: a file cannot be read or written, or holds nothing to draw.
    """
    out = file.with_suffix(".png") if out is None else out
    if out.suffix.lower() not in _FORMATS:
        raise InputError(f"A picture cannot be written as '{out}'; give a name that ends in {', '.join(_FORMATS)}.")
    points = _read_points(file)
    scores = None if accuracy is None else _read_accuracy(accuracy, points)
    place: Callable[[_Point], float] = (
        (lambda point: point.figure("visual_tokens")) if scores is None else (lambda point: scores[point.row["model"]])
    )
    shown = [point for point in points if scores is None or point.row["model"] in scores]
    batches = sorted({int(point.row["batch"]) for point in shown})
    at_first_size = _at_first_size(shown)
    sizes = {point.label: len({p.megapixels for p in points if p.label == point.label}) for point in points}
    has_sizes = max(sizes.values()) > 1

    figure = Figure(figsize=(_PANEL_IN[0] * (3 if has_sizes else 2), _PANEL_IN[1]), layout="constrained")
    axes: Any = figure.subplots(1, 3 if has_sizes else 2, squeeze=False)[0]
    styles: dict[str, dict[str, Any]] = {
        label: {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)]}
        for index, label in enumerate(dict.fromkeys(point.label for point in points))
    }
    slot = "tokens of an image" if scores is None else "accuracy"
    for panel, batch, column, title in (
        (axes[0], batches[0], "time_ms", f"Latency in ms, batch {batches[0]}"),
        (axes[1], batches[-1], "images_per_s", f"Images/s, batch {batches[-1]}"),
    ):
        for point in at_first_size:
            if int(point.row["batch"]) == batch:
                _draw_point(panel, point, place(point), column, styles[point.label])
        panel.set(title=title, xlabel=slot, yscale="log", xscale="log" if scores is None else "linear")
        _finish(panel)
    if has_sizes:
        _draw_sizes(axes[2], [p for p in points if int(p.row["batch"]) == batches[0]], batches[0], styles)
    handles = [Line2D([], [], linestyle="", label=label, **style) for label, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    last = points[-1].row
    figure.suptitle(f"{last['device']}, PyTorch {last['torch']}", fontsize=9)
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise InputError(f"A picture cannot be written as '{out}': {error.strerror or error}.") from error
    return out


def _draw_point(panel: Axes, point: _Point, x: float, column: str, style: dict[str, Any]) -> None:
    y = point.figure(column)
    if column == "time_ms":
        low, high = point.figure("time_ms_q25"), point.figure("time_ms_q75")
        panel.errorbar(x, y, yerr=[[y - low], [high - y]], capsize=2, **style)
    else:
        panel.plot(x, y, **style)


def _draw_sizes(panel: Axes, points: list[_Point], batch: int, styles: dict[str, dict[str, Any]]) -> None:
    for label in dict.fromkeys(point.label for point in points):
        own = sorted((p for p in points if p.label == label), key=lambda p: p.megapixels)
        panel.plot([p.megapixels for p in own], [p.figure("time_ms") for p in own], **styles[label])
    panel.set(title=f"Time in ms, batch {batch}", xlabel="megapixels of an image", xscale="log", yscale="log")
    _finish(panel)


def _at_first_size(points: list[_Point]) -> list[_Point]:
    first: dict[tuple[str, str], _Point] = {}
    for point in points:
        first.setdefault((point.label, point.row["batch"]), point)
    return list(first.values())


def _finish(panel: Axes) -> None:
    """Write numbers on logarithmic axes as they are, and few of them."""
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
    panel.margins(0.1)
    panel.grid(alpha=0.2)


def _read_points(file: Path) -> list[_Point]:
    points: dict[tuple[str, ...], _Point] = {}
    rows = [
        row for row in _read(file, (*_CIRCUMSTANCES, *_FIGURES)) if (row["step"], row["outcome"]) == (STEP, COMPLETE)
    ]
    for row in rows:
        if row["device"] == rows[-1]["device"]:
            key = tuple(row[name] for name in _CIRCUMSTANCES)
            points[key] = _Point(row)
    if not points:
        raise InputError(
            f"'{file}' holds no complete row of an encoder; write some with python -m sf_mllm.bench encoder --rows "
            f"{file.parent}."
        )
    return list(points.values())


def _read_accuracy(file: Path, points: list[_Point]) -> dict[str, float]:
    models = list(dict.fromkeys(point.row["model"] for point in points))
    scores: dict[str, float] = {}
    for row in _read(file, ("model", "accuracy")):
        try:
            scores[row["model"]] = float(row["accuracy"])
        except ValueError as error:
            raise InputError(
                f"Accuracy '{row['accuracy']}' of '{row['model']}' in '{file}' is no number; give one, such as 68.3."
            ) from error
    if not scores.keys() & set(models):
        guess = nearest(next(iter(scores), ""), models)
        raise InputError(
            f"'{file}' has no accuracy of a model that was measured.{guess} Measured: {', '.join(models)}."
        )
    return scores


def _read(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"'{file}' cannot be read: {reason}; give a CSV file.") from error
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"'{file}' lacks the columns {', '.join(missing)}; give a CSV file that has them.")
    return rows
