"""Time from an image file's content to pixels: decoding, the same for all, and each tower's preprocessing.

Protocol `preprocess-speed-1`: a few files one after the other, in this process; times are for one file.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from sf_mllm.bench.conditions import Conditions, refuse_repeated
from sf_mllm.bench.rows import NO_PROCESSOR, Row, round_to
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.timing import Spread, Work
from sf_mllm.bench.towers import find_tower
from sf_mllm.data.image_io import open_image

PROTOCOL = "preprocess-speed-1"
DECODE, PREPROCESS = "decode", "preprocess"
_FILES = 8
_ANY_MODEL = "any"
_CPU = torch.device("cpu")


def measure_preprocessing(names: Sequence[str], conditions: Conditions, *, sizes: Sequence[ImageSize]) -> Iterator[Row]:
    """Yield a row for decoding and one for each tower's preprocessing.

    Args:
        names: of towers; ratios are to the first one.
        conditions: where and how; the device plays no part.
        sizes: of the drawings in the files; the user's images are taken as they are.

    Raises:
        InputError: a tower is unknown.
    """
    refuse_repeated(list(names), "Tower")
    conditions = replace(conditions, device=_CPU)
    towers = {name: find_tower(name)(None) for name in names}
    for size in sizes if conditions.images.paths is None else sizes[:1]:
        files = conditions.images.files(_FILES, size)
        pictures = [open_image(file) for file in files]
        sizes_of_files = {picture.size for picture in pictures}
        works: dict[str, Work] = {_ANY_MODEL: functools.partial(_for_each, open_image, files)}
        rows = {_ANY_MODEL: Row(PROTOCOL, DECODE, _ANY_MODEL)}
        for name, tower in towers.items():
            rows[name] = Row(PROTOCOL, PREPROCESS, name)
            if tower.preprocess is None:
                rows[name].outcome = NO_PROCESSOR
            else:
                works[name] = functools.partial(_for_each, tower.preprocess, pictures)
        for work in works.values():
            work()
        times = conditions.time_in_turns(works)
        for name, row in rows.items():
            if len(sizes_of_files) == 1:
                row.width, row.height = pictures[0].size
            row.batch, row.threads, row.images = 1, torch.get_num_threads(), conditions.images.name
            if name in times:
                _add_times(row, times, len(files), next(iter(names)))
            yield row


def _add_times(row: Row, times: dict[str, Spread], count: int, first: str) -> None:
    own = times[row.model].per(count)
    is_compared = row.step == PREPROCESS and row.model != first and first in times
    row.add_times(own, times[first].per(count) if is_compared else None, first)
    row.images_per_s = round_to(1e3 / own.median)


def _for_each(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    for item in items:
        function(item)
