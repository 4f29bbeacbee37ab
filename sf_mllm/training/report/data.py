"""What a report is made from: the records of run folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.region_snapshots import RegionSnapshot, load_snapshots

Curve = tuple[list[int], list[float]]
"""Steps and values."""


@dataclass
class TaskFigures:
    """Last measured scores of a zero-shot task, shares of one."""

    task: str
    student: float
    teacher: float
    chance: float
    samples: int
    retention: float | None  # None: the teacher does not know the task


@dataclass
class RunData:
    """One run folder, read."""

    name: str
    settings: dict[str, Any]  # config.yaml, nested keys joined by dots
    record: dict[str, Any]  # run.json
    rows: list[dict[str, Any]]  # metrics.jsonl
    snapshots: list[RegionSnapshot]

    @property
    def metrics(self) -> list[str]:
        """Names of all logged numbers, in the order in which they first came."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @property
    def tasks(self) -> list[str]:
        """Zero-shot tasks that were measured."""
        suffix = "_teacher_accuracy"
        return [name.removeprefix("eval_").removesuffix(suffix) for name in self.metrics if name.endswith(suffix)]

    def curve(self, metric: str) -> Curve:
        """Return a metric over the steps; of a step that was taken twice the later value."""
        values = {row["step"]: row[metric] for row in self.rows if isinstance(row.get(metric), int | float)}
        return list(values), list(values.values())

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if it was never measured."""
        _, values = self.curve(metric)
        return values[-1] if values else None

    def final_tasks(self) -> list[TaskFigures]:
        """Return the last scores of every task."""
        last = {name: value for row in self.rows for name, value in row.items()}
        return [
            TaskFigures(
                task,
                student=last[f"eval_{task}_accuracy"],
                teacher=last[f"eval_{task}_teacher_accuracy"],
                chance=last[f"eval_{task}_chance"],
                samples=last[f"eval_{task}_samples"],
                retention=last.get(f"eval_{task}_retention"),
            )
            for task in self.tasks
        ]


def read_runs(paths: Sequence[Path], *, need_metrics: bool = True) -> list[RunData]:
    """Read run folders; they are named by the shortest ends of their paths that tell them apart.

    Args:
        paths: of the folders.
        need_metrics: refuse runs that have logged nothing, as one that fails at once.

    Raises:
        InputError: a folder is given twice, is no run, or has logged nothing though that is needed.
    """
    resolved = [path.resolve() for path in paths]
    for path, own in zip(paths, resolved, strict=True):
        if resolved.count(own) > 1:
            raise InputError(f"Run folder '{path}' is given twice; name each run once.")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return [
        _read_run(path, "/".join(own.parts[-depth:]), need_metrics) for path, own in zip(paths, resolved, strict=True)
    ]


def differing_settings(runs: Sequence[RunData]) -> list[str]:
    """Names of the settings in which runs differ, without where they were written to."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    absent = object()
    return [
        name
        for name in names
        if name != "output_dir"
        and any(run.settings.get(name, absent) != runs[0].settings.get(name, absent) for run in runs)
    ]


def _read_run(path: Path, name: str, need_metrics: bool) -> RunData:
    config, record, metrics = files = [path / file for file in ("config.yaml", "run.json", "metrics.jsonl")]
    missing = [file.name for file in files if not file.is_file() and (need_metrics or file != metrics)]
    if missing:
        raise InputError(
            f"'{path}' is no run folder with results, it lacks {', '.join(missing)}; give a run's output_dir."
        )
    rows = _read_rows(metrics) if metrics.is_file() else []
    if need_metrics and not rows:
        raise InputError(f"Run '{path}' has not logged anything yet; wait for its first line.")
    return RunData(
        name=name,
        settings=_flatten(OmegaConf.to_container(OmegaConf.load(config))),
        record=json.loads(record.read_text(encoding="utf-8")),
        rows=rows,
        snapshots=load_snapshots(path),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):  # a run that is killed, or just writing, may leave its last line torn
                raise InputError(f"Line {number} of '{path}' is not JSON; the file was changed.") from error
    return rows


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values}
    return {name: value for key, inner in values.items() for name, value in _flatten(inner, f"{prefix}{key}.").items()}
