"""Results of `eval.compare_encoders`: from run folders to rows, from rows to one table."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sf_mllm.errors import InputError

TYPES = ("color", "shape", "size", "count", "existence", "position", "relation", "comparison", "description")
_NAMES = {
    "patches": "all teacher patches",
    "pooled": "teacher patches, 2x2 averaged",
    "pixel-shuffle": "teacher patches, 2x2 side by side",
    "resampler": "teacher patches, resampler",
    "none": "no image",
}
_CHOICES = ("teacher_layer", "projector_learning_rate")
_OWN_TO_A_FOLDER = ("encoders",)
"""Settings in which the folders of one table may differ: variants may be spread over several."""


def read_results(folders: Sequence[Path], speed_columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each finished run, with what its variant costs where that was measured.

    Args:
        folders: of one comparison.
        speed_columns: of `compare_speed`; empty in rows whose variant was not measured.

    Raises:
        InputError: there is none, or the folders' settings differ.
    """
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for folder in folders:
        try:
            found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"'{folder}' holds no comparison; give the folder of --out.") from error
        found = {name: value for name, value in found.items() if name not in _OWN_TO_A_FOLDER}
        differing = sorted(name for name in found if settings and found[name] != settings[name])
        if differing:
            raise InputError(
                f"'{folder}' has other settings than '{folders[0]}' (different: {', '.join(differing)}); "
                "make a table of each."
            )
        settings = found
        for file in sorted((folder / "runs").glob("*.json")):
            row = json.loads(file.read_text(encoding="utf-8"))
            speed_file = speed_result_file(folder, row["variant"], row["teacher_layer"])
            speed = json.loads(speed_file.read_text(encoding="utf-8")) if speed_file.is_file() else {}
            measured = {name: speed.get(name, "") for name in speed_columns}
            # The provenance stays in the last columns.
            place = list(row).index("features_s")
            items = list(row.items())
            rows.append(dict(items[:place]) | measured | dict(items[place:]))
    if not rows:
        raise InputError(f"No run is finished in {', '.join(map(str, folders))}; start the command train first.")
    return rows


def speed_result_file(out: Path, variant: str, layer: int | str | None) -> Path:
    """Where the cost of a variant lies; `layer` is empty or None where there is no teacher."""
    suffix = "" if layer in ("", None) else f"-layer{layer}"
    return out / "speed" / f"{variant}{suffix}.json"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one table of all variants, from rows of `read_results` or of the results file.

    A variant that was tried with several rates or layers is shown with those of the lowest mean validation loss. The
    mean over question types has its range over seeds behind it; all other accuracies are means over seeds.
    """
    variants: dict[str, dict[tuple[str, ...], list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        variants[row["variant"]][tuple(str(row[name]) for name in _CHOICES)].append(row)
    chosen = [min(tried.values(), key=lambda runs: _mean(runs, "validation_loss")) for tried in variants.values()]
    chosen.sort(key=_order)
    head = [
        *("visual tokens from", "tokens", "mean accuracy (range; seeds)", *TYPES),
        *("encoder ms, batch 1 / 64", "first token ms, batch 1 / 64", "memory GiB, answering 64"),
        *("training step ms", "training step GiB", "training s"),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_cells(runs)) + " |" for runs in chosen]
    return "\n".join(lines)


def _cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    first = runs[0]
    means = [100 * float(run["accuracy_mean"]) for run in runs]
    overall = f"{statistics.mean(means):.1f} ({min(means):.1f} to {max(means):.1f}; {len(runs)})"
    name = _NAMES.get(first["variant"], "ours")
    return [
        name if first["teacher_layer"] in ("", None) else f"{name}, layer {first['teacher_layer']}",
        str(first["tokens_per_image"]),
        overall,
        *(_percent(runs, f"accuracy_{kind}") for kind in TYPES),
        f"{_cell(first, 'encoder_ms_1')} / {_cell(first, 'encoder_ms_64')}",
        f"{_cell(first, 'first_token_ms_1')} / {_cell(first, 'first_token_ms_64')}",
        _cell(first, "answer_memory_gib"),
        _cell(first, "train_step_ms"),
        _cell(first, "train_step_memory_gib"),
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
    value = row[column]
    return "-" if value == "" else f"{float(value):.3g}"
