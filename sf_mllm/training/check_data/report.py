"""What `training.check_data` finds out about the conversations of a run, as numbers and as a table to read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sf_mllm.config import write_text_atomically
from sf_mllm.data.row_checks import Problem, RowChecks
from sf_mllm.errors import InputError
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.rows import (
    RowPlan,
    check_conversations,
    count_usable,
    find_conversations,
    list_unusable,
    plan_rows,
)

_SHOWN_ROWS = 10
# Keys of a source's numbers and what the table calls them.
_LINES = {
    "rows": "rows",
    "turns": "turns",
    "images": "images",
    "missing_images": "  missing",
    "damaged_images": "  damaged",
    "malformed_rows": "malformed rows",
    "refused_rows": "rows the chat template refuses",
    "truncated_rows": "rows cut at max_length",
    "lost_answer_tokens": "  answer tokens they lose",
    "unsupervised_rows": "rows without a supervised token",
    "unusable_rows": "rows that cannot be used, in all",
    "tokens_min": "tokens a row, uncut: least",
    "tokens_median": "  median",
    "tokens_95_percent": "  95 %",
    "tokens_max": "  most",
    "tokens_mean": "  mean",
    "tokens": "tokens of usable rows, cut",
    "supervised_tokens": "  supervised",
    "weight": "weight",
    "held_out_rows": "held-out rows",
    "rows_an_epoch": "rows an epoch",
    "tokens_an_epoch": "tokens an epoch",
}


def make_report(config: InstructConfig, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int) -> dict[str, Any]:
    """Check all rows and images that a run would use.

    Args:
        config: of the run.
        tokenizer: with `<image>` and the chat template, from `part_files.load_tokenizer`.
        tokens_per_image: visual tokens.

    Returns:
        What `--json` writes: "sources" and "total" hold the numbers, "unusable" the rows, "accepted" and "verdict" what
        training would say.

    Raises:
        InputError: a source cannot be opened.
    """
    conversations = find_conversations(config, Path(config.output_dir) / "scenes")
    checks = check_conversations(config, conversations.source, tokenizer, tokens_per_image, decode_images=True)
    plan, verdict = None, ""
    try:
        plan = plan_rows(config, conversations, checks)
    except InputError as error:
        verdict = f"Training would refuse this data: {error}"
    else:
        dropped = f" {len(checks.reasons)} rows are left out." if checks.reasons else ""
        verdict = (
            f"Training would accept this data: {len(plan.training):,} rows an epoch, "
            f"{len(plan.held_out):,} held out.{dropped}"
        )
    everything = np.arange(len(conversations.source))
    source_of = conversations.source_of(everything)
    sources = []
    for number, source in enumerate(conversations.source.sources):
        names = {"conversations": source.label, "licence": conversations.licences[number]}
        numbers = _count(checks, plan, np.flatnonzero(source_of == number))
        sources.append({**names, "weight": conversations.weights[number], **numbers})
    return {
        "accepted": plan is not None,
        "verdict": verdict,
        "tokens_per_image": tokens_per_image,
        "max_length": config.data.max_length,
        "sources": sources,
        "total": _count(checks, plan, everything),
        "unusable": list(list_unusable(conversations, checks)),
    }


def format_report(report: dict[str, Any]) -> str:
    """Return the report as lines to read: sources, a table with one column each, unusable rows, the verdict."""
    sources = report["sources"]
    lines = [f"An image is {report['tokens_per_image']} tokens; max_length is {report['max_length']}."]
    lines += [f"source {n}: {s['conversations']}  (licence: {s['licence']})" for n, s in enumerate(sources, start=1)]
    columns = [(str(number), source) for number, source in enumerate(sources, start=1)]
    if len(sources) > 1:
        columns.append(("all", report["total"]))
    cells = [["", *(name for name, _ in columns)]]
    cells += [[title, *(_format(numbers.get(key)) for _, numbers in columns)] for key, title in _LINES.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines.append("")
    lines += [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    unusable = report["unusable"]
    if unusable:
        lines += ["", "Rows that cannot be used:"]
        lines += [f"  {row['place']}: {row['reason']}" for row in unusable[:_SHOWN_ROWS]]
        if len(unusable) > _SHOWN_ROWS:
            lines.append(f"  and {len(unusable) - _SHOWN_ROWS:,} more; --json FILE lists all")
    return "\n".join([*lines, "", report["verdict"]])


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """Write the report as JSON, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_text_atomically(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"The report cannot be written to '{path}' ({error.strerror}); give another file.") from error


def _count(checks: RowChecks, plan: RowPlan | None, rows: np.ndarray) -> dict[str, Any]:
    """Count what is in some rows; what depends on the plan is None without one."""
    found = checks.rows[rows]
    tokenised = found[found["tokens"] > 0]
    lost = tokenised["answer_tokens"] - tokenised["kept_answer_tokens"]
    usable = count_usable(checks, rows)
    problems = RowChecks(found, {}).count_problems()
    counts: dict[str, Any] = {
        "rows": len(rows),
        "turns": int(found["turns"].sum()),
        "images": int(found["images"].sum()),
        "missing_images": int(found["missing_images"].sum()),
        "damaged_images": int(found["damaged_images"].sum()),
        "malformed_rows": problems.get(Problem.MALFORMED.words, 0),
        "refused_rows": problems.get(Problem.REFUSED_BY_TEMPLATE.words, 0),
        "truncated_rows": int((tokenised["kept_tokens"] < tokenised["tokens"]).sum()),
        "lost_answer_tokens": int(lost.sum(dtype=np.int64)),
        "unsupervised_rows": int((tokenised["kept_answer_tokens"] == 0).sum()),
        "unusable_rows": len(rows) - usable["rows"],
        "tokens": usable["tokens"],
        "supervised_tokens": usable["supervised_tokens"],
    }
    if len(tokenised):
        tokens = tokenised["tokens"]
        counts |= {
            "tokens_min": int(tokens.min()),
            "tokens_median": float(np.median(tokens)),
            "tokens_95_percent": float(np.percentile(tokens, 95)),
            "tokens_max": int(tokens.max()),
            "tokens_mean": float(tokens.mean()),
        }
    if plan is not None:
        trained = plan.training[np.isin(plan.training, rows)]
        counts |= {
            "held_out_rows": int(np.isin(plan.held_out, rows).sum()),
            "rows_an_epoch": len(trained),
            "tokens_an_epoch": int(checks.rows["kept_tokens"][trained].sum(dtype=np.int64)),
        }
    return counts


def _format(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.4g}"
