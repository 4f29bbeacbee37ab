"""From what a configuration says about images to the source or the shards that it means."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.data.image_sources import IMAGE_SUFFIXES, FolderImages, ImageSource, JoinedImages, TableImages, digest
from sf_mllm.data.tar_shards import TarShards, is_local
from sf_mllm.errors import InputError, first_line, nearest

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
        return _open_hub(spec, image_column)
    if not is_local(spec):
        return _open_shards(_expand_braces(spec), image_column)
    if os.path.isdir(spec):
        return _open_folder(spec, image_column)
    paths = sorted(path for pattern in _expand_braces(spec) for path in _expand_stars(pattern))
    if not paths:
        raise InputError(f"'{spec}' does not exist; data.images takes {FORMS}.")
    return _open_files(paths, spec, image_column)


def _open_folder(folder: str, image_column: str | None) -> ImageSource | TarShards:
    names = set(os.listdir(folder))
    if "dataset_dict.json" in names:
        raise InputError(f"'{folder}' holds several splits; give one of them, for example {folder.rstrip('/')}/train.")
    if {"dataset_info.json", "state.json"} <= names:
        import datasets

        table = datasets.load_from_disk(folder)
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
    if len(kinds) > 1 or None in kinds:
        raise InputError(
            f"'{spec}' means {len(paths)} files that are not all tar, all parquet or all arrow files; data.images "
            f"takes {FORMS}."
        )
    kind = kinds.pop()
    if kind == "tar":
        return _open_shards(paths, image_column)
    import datasets  # only runs on tables need it

    try:
        if kind == "arrow":
            table = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])
        else:  # converted once into a file of the datasets cache that can be mapped into memory
            table = datasets.load_dataset("parquet", data_files={"train": paths}, split="train")
    except Exception as error:  # pyarrow and datasets raise almost anything for a damaged file
        raise InputError(f"'{spec}' cannot be read as {kind} by datasets ({first_line(error)}); repair it.") from error
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


def _open_hub(spec: str, image_column: str | None) -> ImageSource:
    import datasets

    name, _, split = spec.removeprefix("hf:").partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise InputError(f"'{spec}' is not of the form hf:OWNER/NAME or hf:OWNER/NAME:split.")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the network, of the hub, of the files
        raise InputError(f"Data set '{spec}' cannot be loaded by datasets ({first_line(error)}).") from error
    return _wrap_table(table, image_column, spec, [])


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
    sizes = [f"{file.name} {file.stat().st_size}" for file in files] or [label, table.info.dataset_size]
    return TableImages(table, column, label, digest("table", column, len(table), *sizes))


def _may_hold_images(feature: object) -> bool:
    """Whether a column holds bytes, or structs of bytes and path as an Image column is stored."""
    if isinstance(feature, dict):
        return "bytes" in feature and _may_hold_images(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _kind_of(path: str) -> str | None:
    return next((kind for suffix, kind in _KIND_OF_SUFFIX.items() if path.lower().endswith(suffix)), None)


def _expand_braces(spec: str) -> list[str]:
    if "{" not in spec:
        return [spec]
    from webdataset.shardlists import expand_urls

    return expand_urls(spec)


def _expand_stars(pattern: str) -> list[str]:
    """Return the files of a pattern; a name without stars stays, so that a missing one of a range is noticed."""
    if glob.has_magic(pattern):
        return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return [pattern] if os.path.exists(pattern) or _kind_of(pattern) else []
