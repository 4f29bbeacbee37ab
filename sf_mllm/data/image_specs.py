"""From what a configuration says about images to the source or the shards that it means."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.data.image_sources import IMAGE_SUFFIXES, FolderImages, ImageSource, JoinedImages, TableImages, digest
from sf_mllm.data.tables import describe_sizes, is_saved_table, load_hub_table, load_saved_table, load_table_files
from sf_mllm.data.tar_shards import TarShards, is_local
from sf_mllm.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets

FORMS = (
    "a folder of images, tar shards (/data/{000..099}.tar, /data/*.tar, pipe:COMMAND, https://...), parquet or arrow "
    "files, a folder written by save_to_disk, hf:OWNER/NAME[:split]"
)
_KIND_OF_SUFFIX = {".tar": "tar", ".tgz": "tar", ".tar.gz": "tar", ".parquet": "parquet", ".arrow": "arrow"}


def open_images(specs: Sequence[str], image_column: str | None = None) -> ImageSource | TarShards:
    """Find the images that a list of descriptions means; nothing is decoded.

    Args:
        specs: each one of `FORMS`; tar shards cannot be mixed with the other forms.
        image_column: column of a table or extension in a tar shard that holds the images, where that is not clear.

    Raises:
        InputError: a description means nothing, or something that holds no images.
    """
    if not specs or not all(isinstance(spec, str) and spec for spec in specs):
        raise InputError(f"data.images must be one or several of: {FORMS}; got {list(specs)}.")
    found = [_open_one(spec, image_column) for spec in specs]
    shards = [item for item in found if isinstance(item, TarShards)]
    if not shards:
        sources = [item for item in found if not isinstance(item, TarShards)]
        return sources[0] if len(sources) == 1 else JoinedImages(sources)
    if len(shards) < len(found):
        raise InputError(
            f"data.images mixes tar shards with other forms ({', '.join(specs)}), but shards can only be read from "
            "front to back; give shards only, or none."
        )
    return TarShards([url for part in shards for url in part.urls], shards[0].image_extension)


def _open_one(spec: str, image_column: str | None) -> ImageSource | TarShards:
    if spec.startswith("hf:"):
        return _wrap_table(load_hub_table(spec), image_column, spec, [])
    if not is_local(spec):
        return _open_shards(expand_braces(spec), image_column)
    if os.path.isdir(spec):
        return _open_folder(spec, image_column)
    paths = sorted(path for pattern in expand_braces(spec) for path in _expand_stars(pattern))
    if not paths:
        raise InputError(f"'{spec}' does not exist; data.images takes {FORMS}.")
    return _open_files(paths, spec, image_column)


def _open_folder(folder: str, image_column: str | None) -> ImageSource | TarShards:
    if is_saved_table(folder):
        table = load_saved_table(folder)
        return _wrap_table(table, image_column, folder, [Path(file["filename"]) for file in table.cache_files])
    files: dict[str, list[str]] = {}
    for parent, _, found in os.walk(folder):
        for name in found:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                return FolderImages(folder)
            if kind := _kind_of(name):
                files.setdefault(kind, []).append(os.path.join(parent, name))
    if len(files) != 1:
        what = f"holds {' and '.join(sorted(files))} files" if files else "holds neither images nor files of images"
        raise InputError(f"Folder '{folder}' {what}; data.images takes {FORMS}.")
    return _open_files(sorted(*files.values()), folder, image_column)


def _open_files(paths: list[str], spec: str, image_column: str | None) -> ImageSource | TarShards:
    kinds = {_kind_of(path) for path in paths}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise InputError(
            f"'{spec}' means {len(paths)} files that are not all tar, all parquet or all arrow files; data.images "
            f"takes {FORMS}."
        )
    if kind == "tar":
        return _open_shards(paths, image_column)
    table = load_table_files(paths, kind, spec)
    return _wrap_table(table, image_column, spec, [Path(path) for path in paths])


def _open_shards(urls: list[str], image_column: str | None) -> TarShards:
    import webdataset

    schemes = [scheme for scheme in webdataset.gopen_schemes if not scheme.startswith("__")]
    for url in urls:
        scheme = url.partition(":")[0]
        if not is_local(url) and scheme not in schemes:
            raise InputError(
                f"data.images: webdataset does not open '{url}'.{nearest(scheme, schemes)} It knows "
                f"{', '.join(schemes)}; use pipe:COMMAND for what a command can print."
            )
    return TarShards(urls, image_column.lstrip(".").lower() if image_column else None)


def _wrap_table(table: datasets.Dataset, image_column: str | None, label: str, files: list[Path]) -> TableImages:
    """Pick the column of images, undecoded."""
    import datasets

    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = images or [name for name, feature in features.items() if _may_hold_images(feature)]
    if image_column is not None:
        if image_column not in features:
            raise InputError(
                f"'{label}' has no column '{image_column}' (data.image_column).{nearest(image_column, features)} "
                f"Its columns: {', '.join(features)}."
            )
        candidates = [image_column] if image_column in images or _may_hold_images(features[image_column]) else []
    if len(candidates) != 1:
        what = f"{len(candidates)} columns of images ({', '.join(candidates)})" if candidates else "no column of images"
        raise InputError(f"'{label}' has {what}; set data.image_column to one of: {', '.join(features)}.")
    column = candidates[0]
    table = table.select_columns([column])
    if column in images:
        table = table.cast_column(column, datasets.Image(decode=False))
    sizes = describe_sizes(table, files, label)
    return TableImages(table, column, label, digest("table", column, len(table), *sizes))


def _may_hold_images(feature: object) -> bool:
    """Whether a column holds bytes, or structs of bytes and path as an Image column is stored."""
    if isinstance(feature, dict):
        return "bytes" in feature and _may_hold_images(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _kind_of(path: str) -> str | None:
    return next((kind for suffix, kind in _KIND_OF_SUFFIX.items() if path.lower().endswith(suffix)), None)


def expand_braces(spec: str) -> list[str]:
    """Return every name that a description with ranges such as {000..099} stands for."""
    if "{" not in spec:
        return [spec]
    from webdataset.shardlists import expand_urls

    return expand_urls(spec)


def _expand_stars(pattern: str) -> list[str]:
    """Return the files of a pattern; a name without stars stays, so that a missing one of a range is noticed."""
    if glob.has_magic(pattern):
        return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return [pattern] if os.path.exists(pattern) or _kind_of(pattern) else []
