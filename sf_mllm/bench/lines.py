"""Rows as lines that a person reads."""

from sf_mllm.bench.rows import COMPLETE, Row, Value
from sf_mllm.bench.tower import RANDOM


def describe_group(row: Row) -> str:
    """Return the heading of the rows that share a step and its circumstances."""
    batch = f"batch {row.batch}" if row.batch != "" else ""
    return ", ".join(filter(None, (row.step, batch, row.precision, row.mode)))


def describe_row(row: Row, width: int) -> str:
    """Put a row into one line: which model, and what came out.

    Args:
        row: to describe.
        width: characters of the longest name of a model.
    """
    model = f"{row.model:<{width}} {'random' if row.weights == RANDOM else '':<6}"
    image = [
        f"{row.width}x{row.height}" if row.width != "" else "",
        f"{row.visual_tokens} tokens" if row.visual_tokens != "" else "",
    ]
    return f"  {model}  {', '.join(filter(None, [*image, *_figures(row)]))}"


def _figures(row: Row) -> list[str]:
    if row.outcome != COMPLETE:
        return [row.outcome]
    parts = [f"{_short(row.time_ms)} ms ({_short(row.time_ms_q25)} to {_short(row.time_ms_q75)})"]
    if row.images_per_s != "":
        parts.append(f"{_short(row.images_per_s)} images/s")
    if row.tokens_per_s != "":
        parts.append(f"{_short(row.tokens_per_s)} tokens/s")
    if row.peak_memory_gib != "":
        parts.append(f"peak {_short(row.peak_memory_gib)} GiB")
    if row.time_ratio != "":
        low, high = _short(row.time_ratio_q25), _short(row.time_ratio_q75)
        parts.append(f"{_short(row.time_ratio)} times {row.ratio_to} ({low} to {high})")
    return parts


def _short(value: Value) -> str:
    """Three digits of a figure, without an exponent."""
    assert not isinstance(value, str)
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
