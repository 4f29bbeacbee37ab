"""Time and memory of vision towers, from normalised pixels on the device to tokens.

Protocol `encoder-speed-1`: towers are called in turns on the same images, each in the size asked for, or its own.
Before anything is timed, the tokens of the first images must be those of the same weights in eager float32, computed
by the tower itself or, where it has one, by its reference, which it must then equal in eager float32, too.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sf_mllm.bench.conditions import Conditions, refuse_repeated
from sf_mllm.bench.correctness import check_output, check_reference
from sf_mllm.bench.images import DISTINCT_IMAGES, draw
from sf_mllm.bench.precision import CALIBRATED, check_support, computing_in, prepare_variant
from sf_mllm.bench.rows import Row, round_to
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.timing import Work, forget_peak, free_memory, held_bytes, peak_gib, to_gib, wait
from sf_mllm.bench.tower import Tower, TowerLoader
from sf_mllm.bench.towers import find_tower

PROTOCOL = "encoder-speed-1"
STEP = "encoder"
_REFERENCE_IMAGES = 2
_CALIBRATION_IMAGES = 32


@dataclass
class _Candidate:
    """A tower with the tokens that it must give."""

    tower: Tower
    reference: Tensor  # [2, N, D], eager float32, on the CPU


def measure_encoders(
    names: Sequence[str],
    conditions: Conditions,
    *,
    sizes: Sequence[ImageSize | None],
    batches: Sequence[int],
    precisions: Sequence[str],
    modes: Sequence[str],
) -> Iterator[Row]:
    """Yield a row for each tower in each arrangement.

    Args:
        names: of towers; ratios are to the first one.
        conditions: where and how.
        sizes: see `measure_towers`.
        batches: see there.
        precisions: see there.
        modes: see there.

    Raises:
        InputError: a tower is unknown, or the device cannot do what is asked.
    """
    refuse_repeated(list(names), "Tower")
    loaders = {name: find_tower(name) for name in names}
    yield from measure_towers(loaders, conditions, sizes=sizes, batches=batches, precisions=precisions, modes=modes)


def measure_towers(
    loaders: Mapping[str, TowerLoader],
    conditions: Conditions,
    *,
    sizes: Sequence[ImageSize | None],
    batches: Sequence[int],
    precisions: Sequence[str],
    modes: Sequence[str],
) -> Iterator[Row]:
    """Yield a row for each tower in each arrangement.

    Args:
        loaders: of towers, by the names for their rows; ratios are to the first one.
        conditions: where and how.
        sizes: of the images; None: each tower's own.
        batches: images of one call.
        precisions: of `choices.PRECISIONS`.
        modes: of `choices.MODES`.

    Raises:
        InputError: the device cannot do what is asked.
    """
    arrangements = list(itertools.product(precisions, modes, batches))
    for precision, mode, _ in arrangements:
        check_support(precision, mode, conditions.device)
    for size in sizes:
        candidates: dict[str, _Candidate | Exception] = {}
        for name, loader in loaders.items():
            try:
                candidates[name] = _load(loader, size, conditions)
            except Exception as error:  # libraries raise almost any type; the others go on
                candidates[name] = error
        for precision, mode, batch in arrangements:
            yield from _compare(candidates, conditions, size, precision, mode, batch)


def _load(loader: TowerLoader, size: ImageSize | None, conditions: Conditions) -> _Candidate:
    tower = loader(size)
    pixel_values = tower.normalise(conditions.images.pixels(_REFERENCE_IMAGES, tower.size)).to(conditions.device)
    tokens = _eager_tokens(tower.module, pixel_values)
    if tower.reference is None:
        reference = tokens
    else:
        reference = _eager_tokens(tower.reference, pixel_values)
        check_output(tokens, reference, "float32")
    check_reference(reference)
    return _Candidate(tower, reference)


def _eager_tokens(module: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the tokens of a module in eager float32, on the CPU: [B, N, D]."""
    device = pixel_values.device
    with computing_in("float32", device):
        # One by one: that the batch does not matter is part of what is checked.
        tokens = torch.cat([module.to(device)(image[None]).float().cpu() for image in pixel_values])
    module.cpu()
    return tokens


def _compare(
    candidates: dict[str, _Candidate | Exception],
    conditions: Conditions,
    size: ImageSize | None,
    precision: str,
    mode: str,
    batch: int,
) -> list[Row]:
    """Measure all towers in one arrangement."""
    if mode != "eager":
        torch._dynamo.reset()  # a limit on how often one function is compiled counts earlier arrangements, too
    rows: dict[str, Row] = {}
    works: dict[str, Work] = {}
    for name, candidate in candidates.items():
        rows[name] = row = Row(
            PROTOCOL,
            STEP,
            name,
            batch=batch,
            precision=precision,
            mode=mode,
            threads=torch.get_num_threads(),
            images=conditions.images.name,
        )
        if size is not None:
            row.width, row.height = size
        try:
            if isinstance(candidate, Exception):
                raise candidate
            works[name] = _prepare(row, candidate, conditions)
        except Exception as error:
            conditions.note_failure(row, error)
    try:
        times = conditions.time_in_turns(works)
    except Exception as error:
        for name in works:
            conditions.note_failure(rows[name], error)
        times = {}
    first = next(iter(candidates))
    for name, spread in times.items():
        rows[name].add_times(spread, times.get(first) if name != first else None, first)
        rows[name].images_per_s = round_to(1e3 * batch / spread.median)
    works.clear()
    free_memory(conditions.device)
    return list(rows.values())


def _prepare(row: Row, candidate: _Candidate, conditions: Conditions) -> Work:
    """Fill in what is known of a tower, check what it computes, and return the call that is to be timed."""
    tower, device, precision = candidate.tower, conditions.device, row.precision
    row.weights = tower.weights
    row.visual_tokens = candidate.reference.shape[1]
    row.width, row.height = tower.size
    row.parameters_m = round_to(sum(p.numel() for p in tower.module.parameters()) / 1e6)
    calibration = None
    if precision in CALIBRATED:
        # Drawings that are neither timed nor checked.
        calibration = tower.normalise(draw(_CALIBRATION_IMAGES, tower.size, first=DISTINCT_IMAGES))
    free_memory(device)
    held = held_bytes(device)
    assert isinstance(row.batch, int)
    module = prepare_variant(tower.module, precision, row.mode, device, tower.kernels, calibration)
    forget_peak(device)  # calibrating is no part of it
    row.weights_gib = to_gib(sum(_count_bytes(tensor) for tensor in (*module.parameters(), *module.buffers())))
    dtype = next(module.parameters()).dtype
    pixel_values = tower.normalise(conditions.images.pixels(row.batch, tower.size)).to(device, dtype)

    def work() -> Tensor:
        with computing_in(precision, device):
            return module(pixel_values)

    tolerance = tower.tolerances.get(precision)
    row.relative_error = round_to(check_output(work(), candidate.reference, precision, tolerance), 2)
    if row.mode != "cuda-graphs":  # whose memory is taken once, when it is recorded
        forget_peak(device)
    for _ in range(conditions.warmup):
        work()
    wait(device)
    row.peak_memory_gib = peak_gib(device, besides=held)
    return work


def _count_bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):  # a quantised one claims the size of the values that it stands for
        names, _ = tensor.__tensor_flatten__()
        return sum(_count_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
