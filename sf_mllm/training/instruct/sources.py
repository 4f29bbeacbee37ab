"""The sources of an instruct run's conversations as its configuration names them; imports nothing heavy."""

import math
from dataclasses import dataclass, fields
from typing import Any

from sf_mllm.errors import InputError, nearest

SCENES = "scenes"
"""Name of the built-in drawings."""


@dataclass(frozen=True)
class SourceSettings:
    """One entry of `data.conversations`."""

    conversations: str
    """What `data.conversation_specs` opens, or "scenes"."""
    image_root: str | None = None
    """Folder that image paths are relative to; null: data.image_root."""
    weight: float = 1.0
    """How often a row is seen in an epoch: 2 twice, 0.5 every other row."""
    licence: str | None = None
    """What to note about the licence; null: what the data set says itself."""


def parse_sources(value: Any, image_root: str | None = None) -> list[SourceSettings]:
    """Read `data.conversations`: a path or name, a mapping with the fields of `SourceSettings`, or a list of these.

    Args:
        value: as YAML gives it.
        image_root: of entries that have none of their own.

    Raises:
        InputError: it is none of these; names the entry, and the nearest key for an unknown one.
    """
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise InputError("data.conversations is an empty list; give a path, or a list of at least one source.")
    sources = [_parse_entry(entry, number, image_root) for number, entry in enumerate(entries)]
    if sum(source.conversations == SCENES for source in sources) > 1:
        raise InputError("data.conversations names 'scenes' several times; name it once and give it a weight.")
    return sources


def _parse_entry(entry: Any, number: int, image_root: str | None) -> SourceSettings:
    if isinstance(entry, str):
        entry = {"conversations": entry}
    where = f"data.conversations[{number}]"
    if not isinstance(entry, dict):
        raise InputError(
            f"{where} is {entry!r}; give a path or a mapping such as {{conversations: PATH, weight: 0.5}}."
        )
    known = [field.name for field in fields(SourceSettings)]
    for key in entry:
        if key not in known:
            raise InputError(f"{where}: unknown key '{key}'.{nearest(str(key), known)} Valid keys: {', '.join(known)}.")
    if not isinstance(entry.get("conversations"), str) or not entry["conversations"]:
        raise InputError(f"{where} names no data; set its key 'conversations' to a path.")
    for key in ("image_root", "licence"):
        if not isinstance(entry.get(key), str | None):
            raise InputError(f"{where}.{key} must be a text, got {entry[key]!r}.")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise InputError(
            f"{where}.weight must be a number above 0, got {weight!r}; leave the source out to not use it."
        )
    root = entry.get("image_root")
    return SourceSettings(
        entry["conversations"], image_root if root is None else root, float(weight), entry.get("licence")
    )
