"""Hugging Face data sets by their description: files, folders written by save_to_disk, the hub; whatever they hold."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sf_mllm.errors import InputError, first_line

if TYPE_CHECKING:
    import datasets


def is_saved_table(folder: str | Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`.

    Raises:
        InputError: it holds several splits, of which one has to be named.
    """
    names = set(os.listdir(folder))
    if "dataset_dict.json" in names:
        example = f"{str(folder).rstrip('/')}/train"
        raise InputError(f"'{folder}' holds several splits; give one of them, for example {example}.")
    return {"dataset_info.json", "state.json"} <= names


def load_saved_table(folder: str | Path) -> datasets.Dataset:
    """Map a folder written by `save_to_disk` into memory.

    Raises:
        InputError: its files are damaged.
    """
    import datasets  # only runs on tables need it

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise almost anything for a damaged file
        raise InputError(f"'{folder}' cannot be read by datasets ({first_line(error)}); repair it.") from error


def load_table_files(paths: Iterable[str], kind: str, spec: str) -> datasets.Dataset:
    """Map files of one kind, "arrow" or "parquet", into memory, one after the other.

    Raises:
        InputError: they are damaged, or their columns differ; `spec` is how the message calls them.
    """
    import datasets

    paths = list(paths)
    try:
        if kind == "arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths])
        # converted once into a file of the datasets cache that can be mapped into memory
        return datasets.load_dataset("parquet", data_files={"train": paths}, split="train")
    except Exception as error:  # pyarrow and datasets raise almost anything for a damaged file
        raise InputError(f"'{spec}' cannot be read as {kind} by datasets ({first_line(error)}); repair it.") from error


def load_hub_table(spec: str) -> datasets.Dataset:
    """Load `hf:OWNER/NAME` or `hf:OWNER/NAME:split` (default: train) from the hub or its cache.

    Raises:
        InputError: it is no such description, or cannot be had.
    """
    import datasets

    name, _, split = spec.removeprefix("hf:").partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise InputError(f"'{spec}' is not of the form hf:OWNER/NAME or hf:OWNER/NAME:split.")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the network, of the hub, of the files
        raise InputError(f"Data set '{spec}' cannot be loaded by datasets ({first_line(error)}).") from error


def describe_sizes(table: datasets.Dataset, files: Iterable[Path], label: str) -> list[str]:
    """Return what tells two tables of one kind apart without reading them: names and sizes of their files."""
    return [f"{file.name} {file.stat().st_size}" for file in files] or [label, str(table.info.dataset_size)]
