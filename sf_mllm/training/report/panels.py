"""Which curves a report shows: panels by subject, from what the runs have logged."""

from collections.abc import Mapping, Sequence

from sf_mllm.training.report.data import RunData
from sf_mllm.training.report.figures import INK, Line, Panel, color_of

_LOSS_NAMES = {"loss": "total"}
_TIME_PARTS = "time_"
_CLOSER_FROM = 0.95
_LOOSELY_DOTTED = (0, (1, 6))


def make_sections(runs: Sequence[RunData]) -> dict[str, list[Panel]]:
    """Return the panels by the titles of their sections; sections without anything to show are left out."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    samplings = {name: f"sampling {name.rpartition('_')[2]}" for name in metrics if _is_of_one_sampling(name)}
    losses = {name: name.removeprefix("loss_") for name in metrics if name.startswith("loss")} | _LOSS_NAMES
    times = {name: name[len(_TIME_PARTS) : -len("_ms")] for name in metrics if _is_time(name)}
    if len(runs) > 1:
        times = {name: "" for name, part in times.items() if part == "step"}
    sections = {
        "What the student kept": _make_retention_panels(runs) + _make_task_panels(runs),
        "Regions": [
            *_split("Spread of centres over images", {"eval_roi_center_spread": ""}, runs),
            *_split("Area of a region", {"eval_roi_area": ""}, runs, is_share=True),
            *_split("Sampling points outside", {"eval_roi_points_outside": "all", **samplings}, runs, is_share=True),
            *_split("Objects covered by a small region", {"eval_roi_objects_covered": ""}, runs, is_share=True),
            *_split(
                "Objects' share",
                {"eval_roi_object_share": "of the regions", "eval_roi_object_share_of_image": "of the image"},
                runs,
                is_share=True,
            ),
        ],
        "Losses, and agreement with the teacher on held-out images": [
            *_split("Loss", losses, runs),
            *_split("Cosine", {"eval_embedding_cosine": "embedding", "eval_tokens_cosine": "tokens"}, runs),
            *_split("Same class", {"eval_class_agreement": ""}, runs, is_share=True),
        ],
        "Training": [
            *_split("Learning rate", {"learning_rate": ""}, runs),
            *_split("Images a second", {"samples_per_s": ""}, runs, low=0),
            *_split("Milliseconds a step", times, runs, low=0),
            *_split("Gradient norm", {"grad_norm": ""}, runs),
        ],
    }
    return {title: panels for title, panels in sections.items() if panels}


def _split(
    title: str,
    metrics: Mapping[str, str],
    runs: Sequence[RunData],
    *,
    is_share: bool = False,
    low: float | None = None,
) -> list[Panel]:
    """Put the metrics of one run into one panel, and each metric of several runs into a panel of its own.

    Args:
        title: of the panel.
        metrics: label of each metric; "" when it is the only one.
        runs: to draw.
        is_share: show percent.
        low: lower end of the axis.
    """
    known = {name: label for name, label in metrics.items() if any(run.curve(name)[0] for run in runs)}
    if len(runs) == 1:
        lines = [Line(label, color_of(i), runs[0].curve(name)) for i, (name, label) in enumerate(known.items())]
        return [Panel(title, lines, is_share, low)] if lines else []
    return [
        Panel(
            f"{title}: {label}" if label else title,
            [Line(run.name, color_of(i), run.curve(name)) for i, run in enumerate(runs) if run.curve(name)[0]],
            is_share,
            low,
        )
        for name, label in known.items()
    ]


def _make_retention_panels(runs: Sequence[RunData]) -> list[Panel]:
    whole = [Line("", INK, level=1.0, style=":")]
    if len(runs) == 1:
        tasks = [task for task in runs[0].tasks if runs[0].curve(f"eval_{task}_retention")[0]]
        lines = [Line(task, color_of(i), runs[0].curve(f"eval_{task}_retention")) for i, task in enumerate(tasks)]
        mean = [Line("mean", INK, runs[0].curve("eval_mean_retention"))]
        panels = [Panel("Retention: student / teacher", whole + lines + mean, is_share=True)] if tasks else []
    else:
        panels = _split("Mean retention", {"eval_mean_retention": ""}, runs, is_share=True)
        panels = [Panel(panel.title, whole + panel.lines, is_share=True) for panel in panels]
    best = max((run.last("eval_mean_retention") or 0.0 for run in runs), default=0.0)
    closer = [Panel(f"{panel.title}, closer", panel.lines, is_share=True, low=_CLOSER_FROM) for panel in panels]
    return panels + closer if best > _CLOSER_FROM else panels


def _make_task_panels(runs: Sequence[RunData]) -> list[Panel]:
    panels = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        lines = []
        for i, run in enumerate(runs):
            if task in run.tasks:
                teacher = run.last(f"eval_{task}_teacher_accuracy")
                label = run.name if len(runs) > 1 else "student"
                lines += [
                    Line(label, color_of(i), run.curve(f"eval_{task}_accuracy")),
                    Line("teacher" if len(runs) == 1 else "", color_of(i), level=teacher, style=":"),
                ]
        chance = next(run.last(f"eval_{task}_chance") for run in runs if task in run.tasks)
        lines.append(Line("chance" if len(runs) == 1 else "", INK, level=chance, style=_LOOSELY_DOTTED))
        panels.append(Panel(f"Accuracy: {task}", lines, is_share=True))
    return panels


def _is_of_one_sampling(metric: str) -> bool:
    return metric.startswith("eval_roi_points_outside_")


def _is_time(metric: str) -> bool:
    return metric.startswith(_TIME_PARTS) and metric.endswith("_ms")
