"""Stage-one runs compared: train the arms of a study under equal budgets, and keep what came out as rows.

    python -m eval.bootstrap_runs train --out runs/study --parallel 4 STUDY.yaml [key=value ...]
    python -m eval.bootstrap_runs collect runs/study/* --study regions --rows eval/results

A study is a YAML file with `config`, a configuration of stage one, `overrides`, a list for all arms, and `arms`, a list
of overrides for each name; the command line's overrides come last and go to all arms. `train` gives one process and one
GPU to each arm, which several arms share where there are more of them at once than GPUs; the same command again goes on
with what an interruption left. A row holds the last evaluation of one run folder.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sf_mllm.errors import CommandLineParser, InputError, report_input_errors

_RECORDED = {
    "roi_center_spread": "eval_roi_center_spread",
    "roi_points_outside": "eval_roi_points_outside",
    "roi_objects_covered": "eval_roi_objects_covered",
    "roi_area": "eval_roi_area",
    "embedding_cosine": "eval_embedding_cosine",
    "tokens_cosine": "eval_tokens_cosine",
    "mean_retention": "eval_mean_retention",
}
"""Columns and the metrics they hold."""
_NOT_SETTINGS = ("output_dir", "train.dataloader", "train.logging", "train.save", "train.eval", "train.per_device_eval")


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(prog="python -m eval.bootstrap_runs", description="Stage-one runs compared.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the arms of a study")
    train.add_argument("study", type=Path, metavar="STUDY.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for all arms")
    train.add_argument("--out", type=Path, required=True, help="folder of the arms' run folders")
    train.add_argument("--parallel", type=int, default=1, help="arms trained at once (default: 1)")
    collect = commands.add_parser("collect", help="turn run folders into rows")
    collect.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    collect.add_argument("--study", required=True, help="name of the study in the rows")
    collect.add_argument("--note", default="", help="what else a reader of the rows must know")
    collect.add_argument("--rows", type=Path, help="folder whose bootstrap_runs.csv the rows are appended to")
    options = parser.parse_args(argv)
    if options.command == "train":
        return train_study(options.study, options.overrides, options.out, options.parallel)

    rows = make_rows(options.runs, options.study, options.note)
    for row in rows:
        print("  ".join(f"{name} {row[name]}" for name in ("run", "outcome", "settings", *_RECORDED, "accuracies")))
    if options.rows is not None:
        from eval.rows import append_complete_rows

        append_complete_rows("bootstrap_runs", rows, options.rows)
    return 0


def train_study(study_file: Path, overrides: Sequence[str], out: Path, parallel: int) -> int:
    """Train every arm in a process of its own; return how many failed.

    Raises:
        InputError: the file is no study.
    """
    from omegaconf import OmegaConf

    if not study_file.is_file():
        raise InputError(f"Study '{study_file}' does not exist; give a YAML file, see eval/studies/.")
    study = OmegaConf.to_container(OmegaConf.load(study_file))
    if not isinstance(study, dict) or not {"config", "arms"} <= study.keys() <= {"config", "overrides", "arms"}:
        raise InputError(f"Study '{study_file}' must have the keys config, arms and, if wanted, overrides.")
    if parallel < 1:
        raise InputError(f"--parallel {parallel} is not possible; give at least 1.")
    out.mkdir(parents=True, exist_ok=True)
    gpus = _visible_gpus()
    places: SimpleQueue[str | None] = SimpleQueue()  # of the arms trained at once
    for number in range(parallel):
        places.put(gpus[number % len(gpus)] if gpus else None)

    def train(arm: str) -> int:
        gpu = places.get()
        environment = os.environ if gpu is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        settings = [*study.get("overrides", []), *study["arms"][arm], *overrides, f"output_dir={out / arm}"]
        command = [sys.executable, "-m", "sf_mllm.training.bootstrap", study["config"], *settings]
        try:
            with (out / f"{arm}.log").open("w", encoding="utf-8") as log:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        finally:
            places.put(gpu)
        print(f"{arm}: {'complete' if status == 0 else f'failed, see {log.name}'}", flush=True)
        return status

    with ThreadPoolExecutor(parallel) as pool:
        return sum(status != 0 for status in pool.map(train, study["arms"]))


def _visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES would say for each GPU that this process sees."""
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [names[number] if names[0] else str(number) for number in range(torch.cuda.device_count())]


def make_rows(paths: Sequence[Path], study: str, note: str = "") -> list[dict[str, Any]]:
    """Return a row for each run; `settings` are those in which the runs differ."""
    from sf_mllm.training.report.data import read_runs

    runs = read_runs(paths, need_metrics=False)
    names = sorted({name for run in runs for name in run.settings if not name.startswith(_NOT_SETTINGS)})
    differing = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    rows = []
    for run, path in zip(runs, paths, strict=True):
        record, tasks = run.record, run.final_tasks()
        known = [task for task in tasks if task.retention is not None]
        lowest = min(known, key=lambda task: task.retention or 0.0, default=None)
        settings = [f"{name}={run.settings[name]}" for name in differing if run.settings.get(name) is not None]
        rows.append(
            {
                "study": study,
                "run": path.name,
                "outcome": record["outcome"].partition("\n")[0],
                "settings": " ".join(settings),
                "tokens_per_image": record.get("tokens_per_image", ""),
                "steps": record.get("steps", ""),
                "global_batch": record.get("global_batch_size", ""),
                "epochs": record.get("epochs", ""),
                "wall_s": record.get("wall_time_of_last_start_s", ""),
                "images_per_s": record.get("speed", {}).get("images_per_s", ""),
                "peak_memory_gib": record.get("peak_memory_gib", ""),
                **{column: _rounded(run.last(metric)) for column, metric in _RECORDED.items()},
                "lowest_retention": f"{lowest.task} {_rounded(lowest.retention)}" if lowest else "",
                "accuracies": " ".join(f"{t.task} {100 * t.student:.1f}/{100 * t.teacher:.1f}" for t in tasks),
                "samples": max((task.samples for task in tasks), default=""),
                "device": record["device"],
                "torch": record["versions"]["torch"],
                "transformers": record["versions"]["transformers"],
                "python": record["versions"]["python"],
                "revision": (record.get("revision") or "unknown")[:7],
                "date": record["starts"][0]["at"][:10],
                "command": " ".join(record["command"]),
                "note": note,
            }
        )
    return rows


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)


if __name__ == "__main__":
    sys.exit(main())
