"""From what a configuration says about conversations to the source that it means."""

import glob
import os
from pathlib import Path

from sf_mllm.data.conversation_files import LINES_SUFFIXES, LIST_SUFFIXES, FileConversations
from sf_mllm.data.conversation_sources import ConversationSource, JoinedConversations
from sf_mllm.data.conversation_tables import TableConversations
from sf_mllm.data.image_specs import expand_braces
from sf_mllm.data.tables import describe_sizes, is_saved_table, load_hub_table, load_saved_table, load_table_files
from sf_mllm.errors import InputError

FORMS = (
    "a JSON list in LLaVA's format (.json), one row a line (.jsonl), parquet or arrow files (/data/*.parquet), a "
    "folder of such files, a folder written by save_to_disk, hf:OWNER/NAME[:split]"
)
_TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
_KIND_OF_SUFFIX = _TABLE_SUFFIXES | dict.fromkeys(LIST_SUFFIXES + LINES_SUFFIXES, "json")


def open_conversations(spec: str, image_root: str | None = None) -> ConversationSource:
    """Find the conversations that a description means.

    Args:
        spec: one of `FORMS`.
        image_root: folder that image names are relative to; None: the folder of the file that names them.

    Raises:
        InputError: the description means nothing, or something that holds no conversations.
    """
    if spec.startswith("hf:"):
        table = load_hub_table(spec)
        return TableConversations(table, spec, image_root or ".", describe_sizes(table, [], spec))
    if os.path.isdir(spec):
        return _open_folder(spec, image_root)
    paths = [path for pattern in expand_braces(spec) for path in _expand_stars(pattern)]
    if not paths:
        raise InputError(f"'{spec}' means no file; data.conversations takes {FORMS}.")
    return _open_files(paths, spec, image_root)


def _open_folder(folder: str, image_root: str | None) -> ConversationSource:
    if is_saved_table(folder):
        table = load_saved_table(folder)
        files = [Path(file["filename"]) for file in table.cache_files]
        return TableConversations(table, folder, image_root or folder, describe_sizes(table, files, folder))
    paths = sorted(str(path) for path in Path(folder).rglob("*") if _kind_of(path) and path.is_file())
    if not paths:
        raise InputError(f"Folder '{folder}' holds no conversations; data.conversations takes {FORMS}.")
    return _open_files(paths, folder, image_root)


def _open_files(paths: list[str], spec: str, image_root: str | None) -> ConversationSource:
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"Instruction file '{path}' does not exist; data.conversations takes {FORMS}.")
    kinds = {_kind_of(path) for path in paths}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise InputError(f"'{spec}' means files that are not all of one known kind; data.conversations takes {FORMS}.")
    if kind == "json":
        files = [FileConversations(path, image_root) for path in paths]
        return files[0] if len(files) == 1 else JoinedConversations(files, spec)
    table = load_table_files(paths, kind, spec)
    root = image_root or os.path.dirname(paths[0])
    return TableConversations(table, spec, root, describe_sizes(table, [Path(path) for path in paths], spec))


def _kind_of(path: str | Path) -> str | None:
    return _KIND_OF_SUFFIX.get(Path(path).suffix.lower())


def _expand_stars(pattern: str) -> list[str]:
    """Return the files of a pattern; a name without stars stays, so that a missing file is noticed."""
    return sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
