"""Curves of a report as SVG that takes the page's text colour, so that it reads on light and on dark."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, field
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sf_mllm.training.report.data import Curve

PALETTE = (
    "#3b82f6",
    "#f97316",
    "#10b981",
    "#e11d48",
    "#a855f7",
    "#0ea5b7",
    "#d4a106",
    "#ec4899",
    "#84a31c",
    "#94633d",
    "#7c8798",
)
"""Light enough for a dark page and dark enough for a light one."""

INK = "#0a0b0c"
"""Stands for the page's text colour."""

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, and small files
    "svg.hashsalt": "sf_mllm",  # the same curves give the same file
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_SIZE_IN = (4.4, 2.9)
_LEGEND_ROW_IN = 0.17
_WIDE_RANGE = 30  # a quotient of largest and smallest value that needs a logarithmic axis
_MARKED_POINTS = 30  # curves with fewer points show them


LineStyle = str | tuple[int, tuple[int, int]]


@dataclass
class Line:
    """One curve of a panel; without a curve, `level` is a line across it."""

    label: str  # "" leaves it out of the legend
    color: str
    curve: Curve = ([], [])
    level: float | None = None
    style: LineStyle = "-"


@dataclass
class Panel:
    """One set of axes over the steps of training."""

    title: str
    lines: list[Line] = field(default_factory=list)
    is_share: bool = False  # values are shares of one and shown in percent
    low: float | None = None  # lower end of the axis, where only what is above it matters


def draw_svg(panel: Panel) -> str:
    """Draw a panel as an `<svg>` element that fills the width it gets."""
    labels = [line for line in panel.lines if line.label]
    columns = 3 if max((len(line.label) for line in labels), default=0) < 14 else 1
    legend_rows = math.ceil(len(labels) / columns)
    with rc_context(_SETTINGS):
        height = _SIZE_IN[1] + _LEGEND_ROW_IN * legend_rows
        figure = Figure(figsize=(_SIZE_IN[0], height), layout="constrained")
        axes = figure.subplots()
        draw_panel(axes, panel)
        if legend_rows:
            figure.legend(
                *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handlelength=1.6
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The view box alone gives the proportions; without width and height the page decides the size.
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1>', svg, count=1
    )


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw curves, levels, title and axes."""
    factor = 100 if panel.is_share else 1
    for line in panel.lines:
        options: dict[str, Any] = {"color": line.color, "linestyle": line.style, "label": line.label or "_"}
        if line.level is not None:
            axes.axhline(line.level * factor, linewidth=1.1, **options)
            continue
        steps, values = line.curve
        marker = "o" if len(steps) <= _MARKED_POINTS else None
        axes.plot(steps, [value * factor for value in values], linewidth=1.5, marker=marker, markersize=2.6, **options)
    values = [value for line in panel.lines for value in line.curve[1]]
    if panel.low is not None:
        axes.set_ylim(bottom=panel.low * factor)
    elif values and min(values) > 0 and max(values) > _WIDE_RANGE * min(values) and not panel.is_share:
        axes.set_yscale("log")
    axes.set_title(f"{panel.title}, %" if panel.is_share else panel.title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)


def color_of(index: int) -> str:
    """Return the colour of a line by its number; they repeat after the last."""
    return PALETTE[index % len(PALETTE)]
