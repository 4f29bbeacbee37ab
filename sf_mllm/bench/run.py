"""Runs one command of `python -m sf_mllm.bench` and reports its rows."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from transformers.utils import logging as transformers_logging

from sf_mllm.bench.chat import measure_chats
from sf_mllm.bench.choices import DEFAULT_CHATS, DEFAULT_TOWERS
from sf_mllm.bench.conditions import Conditions, DeviceLostError
from sf_mllm.bench.encoder import measure_encoders
from sf_mllm.bench.images import Images
from sf_mllm.bench.lines import describe_group, describe_row
from sf_mllm.bench.preprocess import DECODE, PREPROCESS, measure_preprocessing
from sf_mllm.bench.rows import (
    COMPLETE,
    FILE,
    LOST_IN_NOISE,
    NO_PROCESSOR,
    OUT_OF_MEMORY,
    Row,
    append_rows,
    describe_provenance,
    refuse_other_columns,
)
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.startup import measure_startup
from sf_mllm.bench.tower import RANDOM
from sf_mllm.inference.loading import choose_device, choose_dtype

_OVERVIEW_RUNS = 3
_OVERVIEW_SIZE = ImageSize(640, 480)
_GOOD_OUTCOMES = (COMPLETE, OUT_OF_MEMORY, NO_PROCESSOR, LOST_IN_NOISE)


def run(options: argparse.Namespace) -> int:
    """Measure what the command line asks for.

    Returns:
        Exit status: 0, or 1 if something computed a wrong result or failed; what does not fit the memory is a result.

    Raises:
        InputError: something cannot be had or done here.
    """
    names = (*DEFAULT_CHATS, *getattr(options, "towers", DEFAULT_TOWERS), *getattr(options, "models", ()))
    measure = _COMMANDS[options.command]
    return report(lambda device: measure(options, device), options, names)


def report(measure: Callable[[torch.device], Iterable[Row]], options: argparse.Namespace, names: Sequence[str]) -> int:
    """Measure, show each row as it comes, and append it to the file that the options name.

    Args:
        measure: yields the rows.
        options: with `device`, `threads` and `rows`, as `arguments.add_common` makes them.
        names: of the models, for the width of their column.

    Returns:
        See `run`.

    Raises:
        InputError: something cannot be had or done here.
    """
    _quiet_libraries()
    device = choose_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    provenance = {kind: describe_provenance(kind) for kind in {str(device), "cpu"}}
    if options.rows is not None:
        refuse_other_columns(options.rows / FILE, list(Row("", "", "").to_record(provenance["cpu"])))
    where = provenance[str(device)]
    threads = torch.get_num_threads()
    print(f"{where['device']}, {threads} threads, PyTorch {where['torch']}, revision {where['revision']}", flush=True)
    has_random = has_bad = False
    group = ""
    width = max(map(len, names))
    for row in _until_lost(measure(device)):
        if describe_group(row) != group:
            group = describe_group(row)
            print(group)
        print(describe_row(row, width), flush=True)
        has_random |= row.weights == RANDOM
        has_bad |= row.outcome not in _GOOD_OUTCOMES
        if options.rows is not None:
            kind = "cpu" if row.step in (DECODE, PREPROCESS) else str(device)
            append_rows(options.rows / FILE, [row.to_record(provenance[kind])])
    if has_random:
        print("Random weights cost what trained ones cost; they say nothing about accuracy.")
    if options.rows is not None:
        print(f"The rows are in {options.rows / FILE}")
    return int(has_bad)


def _until_lost(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows, the last one of what took the device away, if something does."""
    try:
        yield from rows
    except DeviceLostError as lost:
        yield lost.row
        print(
            f"error: After this failure of '{lost.row.model}' the device takes no more work from this process; "
            "what was measured before is kept, measure the rest with another command.",
            file=sys.stderr,
        )


def _measure_all(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    conditions = make_conditions(options, device)
    precision = str(choose_dtype(None, device)).removeprefix("torch.")
    yield from measure_preprocessing(DEFAULT_TOWERS, conditions, sizes=[_OVERVIEW_SIZE])
    yield from measure_encoders(
        DEFAULT_TOWERS, conditions, sizes=[None], batches=[1], precisions=[precision], modes=["eager"]
    )
    yield from measure_chats(
        DEFAULT_CHATS,
        conditions,
        batches=[1],
        precision=precision,
        modes=["eager"],
        new_tokens=32,
        text_tokens=64,
    )
    yield from measure_startup(DEFAULT_CHATS[0], repeats=min(options.repeats, _OVERVIEW_RUNS), device=options.device)


def _measure_preprocess(options: argparse.Namespace, device: torch.device) -> Iterable[Row]:
    return measure_preprocessing(options.towers, make_conditions(options, device), sizes=options.size)


def _measure_encoder(options: argparse.Namespace, device: torch.device) -> Iterable[Row]:
    return measure_encoders(
        options.towers,
        make_conditions(options, device),
        sizes=options.size,
        batches=options.batch,
        precisions=options.precision,
        modes=options.mode,
    )


def _measure_chat(options: argparse.Namespace, device: torch.device) -> Iterable[Row]:
    return measure_chats(
        options.models,
        make_conditions(options, device),
        batches=options.batch,
        precision=options.precision or str(choose_dtype(None, device)).removeprefix("torch."),
        modes=options.mode,
        new_tokens=options.new_tokens,
        text_tokens=options.text_tokens,
        question=options.prompt,
    )


def _measure_startup(options: argparse.Namespace, device: torch.device) -> Iterable[Row]:
    return measure_startup(
        options.model,
        repeats=options.repeats,
        device=options.device,
        image=options.image,
        question=options.prompt,
    )


_COMMANDS = {
    "all": _measure_all,
    "preprocess": _measure_preprocess,
    "encoder": _measure_encoder,
    "chat": _measure_chat,
    "startup": _measure_startup,
}


def make_conditions(options: argparse.Namespace, device: torch.device) -> Conditions:
    """Return the conditions that the options of `arguments.add_common` ask for.

    Raises:
        InputError: the folder of images holds none.
    """
    return Conditions(device, Images(options.images), repeats=options.repeats, seconds=options.seconds)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.startswith("sf_mllm")


def _quiet_libraries() -> None:
    """Show this package's warnings only: random weights, which open_clip warns of, are in every row."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger().addFilter(_is_ours)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(open_clip|timm|transformers)\.")
