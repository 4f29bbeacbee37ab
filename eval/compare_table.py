"""Results of `eval.compare_encoders`: from its folders or kept rows to one table."""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sf_mllm.errors import InputError

RUNS, COSTS = "compare_encoders", "compare_speed"
"""Results files: a row for each run, a row for each variant whose cost was measured."""

TYPES = ("color", "shape", "size", "count", "existence", "position", "relation", "comparison", "description")
_NAMES = {
    "patches": "all teacher patches",
    "pooled": "teacher patches, 2x2 averaged",
    "pixel-shuffle": "teacher patches, 2x2 side by side",
    "resampler": "teacher patches, resampler",
    "none": "no image",
}
_CHOICES = ("teacher_layer", "projector_learning_rate")
_SHARED = (
    *("size", "teacher", "decoder", "domain", "scenes", "questions", "steps", "batch_size", "learning_rate"),
    *("lora_rank", "max_length"),
)
"""Settings that all runs of one table have; `encoders` may differ, since variants may be spread over folders."""


def read_results(
    folders: Sequence[Path], *, costs_will_do: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each finished run, and one for each variant whose cost was measured.

    Args:
        folders: of `train`, or with kept rows (eval/results).
        costs_will_do: there need not be a run if there are costs.

    Raises:
        InputError: there is nothing, or runs differ in their settings.
    """
    runs: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    first: tuple[Path, list[str]] | None = None
    for folder in folders:
        own_runs, own_costs = _read_folder(folder)
        for run in own_runs:
            settings = [str(run[name]) for name in _SHARED]
            if first is None:
                first = folder, settings
            pairs = zip(_SHARED, settings, first[1], strict=True)
            if differing := [name for name, value, other in pairs if value != other]:
                raise InputError(
                    f"'{folder}' has a run with other settings than '{first[0]}' (different: {', '.join(differing)}); "
                    "make a table of each."
                )
        runs += own_runs
        costs += own_costs
    if not runs and not (costs and costs_will_do):
        raise InputError(f"No run is finished in {', '.join(map(str, folders))}; start the command train first.")
    return runs, costs


def is_kept(folder: Path) -> bool:
    """Whether a folder holds rows of a results file, not those of a comparison alone."""
    return (folder / f"{RUNS}.csv").is_file()


def _read_folder(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if is_kept(folder):
        # Of what was measured again the last row counts.
        runs = {tuple(row[name] for name in ("variant", "seed", *_CHOICES)): row for row in _read_rows(folder, RUNS)}
        return list(runs.values()), _read_rows(folder, COSTS)
    if not (folder / "settings.json").is_file():
        raise InputError(f"'{folder}' holds no comparison; give the folder of --out, or one with {RUNS}.csv.")
    found = (sorted((folder / name).glob("*.json")) for name in ("runs", "speed"))
    read_runs, read_costs = ([json.loads(file.read_text(encoding="utf-8")) for file in files] for files in found)
    return read_runs, read_costs


def _read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def speed_result_file(out: Path, variant: str, layer: int | str | None) -> Path:
    """Where the cost of a variant lies; `layer` is empty or None where there is no teacher."""
    suffix = "" if layer in ("", None) else f"-layer{layer}"
    return out / "speed" / f"{variant}{suffix}.json"


def markdown_table(runs: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> str:
    """Return one table of all variants.

    A variant that was tried with several rates or layers is shown with those of the lowest mean validation loss. The
    mean over question types has its range over seeds behind it; all other accuracies are means over seeds.

    Args:
        runs: of `read_results`.
        costs: likewise; of a variant measured twice the last one counts.
    """
    by_variant = {(row["variant"], str(row["teacher_layer"])): row for row in costs}
    variants: dict[str, dict[tuple[str, ...], list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in runs:
        variants[row["variant"]][tuple(str(row[name]) for name in _CHOICES)].append(row)
    chosen = [min(tried.values(), key=lambda some: _mean(some, "validation_loss")) for tried in variants.values()]
    chosen.sort(key=_order)
    head = [
        *("visual tokens from", "tokens", "mean accuracy (range; seeds)", *TYPES),
        *("encoder ms, batch 1 / 64", "first token ms, batch 1 / 64", "memory GiB, answering 64"),
        *("training step ms", "training step GiB", "training s"),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for some in chosen:
        cost = by_variant.get((some[0]["variant"], str(some[0]["teacher_layer"])), {})
        lines.append("| " + " | ".join(_cells(some, cost)) + " |")
    return "\n".join(lines)


def _cells(runs: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> list[str]:
    first = runs[0]
    means = [100 * float(run["accuracy_mean"]) for run in runs]
    overall = f"{statistics.mean(means):.1f} ({min(means):.1f} to {max(means):.1f}; {len(runs)})"
    name = _NAMES.get(first["variant"], "ours")
    return [
        name if first["teacher_layer"] in ("", None) else f"{name}, layer {first['teacher_layer']}",
        str(first["tokens_per_image"]),
        overall,
        *(_percent(runs, f"accuracy_{kind}") for kind in TYPES),
        f"{_cell(cost, 'encoder_ms_1')} / {_cell(cost, 'encoder_ms_64')}",
        f"{_cell(cost, 'first_token_ms_1')} / {_cell(cost, 'first_token_ms_64')}",
        _cell(cost, "answer_memory_gib"),
        _cell(cost, "train_step_ms"),
        _cell(cost, "train_step_memory_gib"),
        f"{_mean(runs, 'training_s'):.0f}",
    ]


def _order(runs: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Teacher's variants, then ours by their tokens, then without an image."""
    names = list(_NAMES)
    variant = runs[0]["variant"]
    place = names.index(variant) if variant in names[:-1] else len(names) + (variant == names[-1])
    return place, int(runs[0]["tokens_per_image"])


def _mean(runs: Sequence[Mapping[str, Any]], column: str) -> float:
    return statistics.mean(float(run[column]) for run in runs)


def _percent(runs: Sequence[Mapping[str, Any]], column: str) -> str:
    return "-" if runs[0][column] == "" else f"{100 * _mean(runs, column):.1f}"


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column, "")
    return "-" if value == "" else f"{float(value):.3g}"
