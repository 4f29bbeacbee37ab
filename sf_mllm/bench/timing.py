"""How long calls take and how much memory they need: the one place that measures work from outside.

A time is that of one call, from an idle device until the device has finished, and includes what the host does. What is
compared is called in turns, so that a machine that slows down slows all of them down.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

MINIMUM_ROUNDS = 5
"""Fewest rounds that a limit of time may leave: quartiles of fewer say little."""

Work = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Samples of one figure, one a round, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the samples lie below."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the samples lie below the first, a quarter above the second."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def over(self, other: "Spread") -> "Spread":
        """Divide round by round: what slowed a whole round down cancels."""
        return Spread(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))

    def minus(self, other: "Spread") -> "Spread":
        """Subtract round by round."""
        return Spread(tuple(a - b for a, b in zip(self.samples, other.samples, strict=True)))

    def per(self, number: float) -> "Spread":
        """Divide every sample by a number."""
        return Spread(tuple(sample / number for sample in self.samples))


def time_in_turns(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    repeats: int,
    seconds: float | None = None,
    warmup: int = 0,
) -> dict[str, Spread]:
    """Call several works in turns, forwards in one round and backwards in the next.

    Args:
        works: by name.
        device: that they use.
        repeats: rounds.
        seconds: stop earlier when a work has had this many on average, after `MINIMUM_ROUNDS` at least.
        warmup: calls of each work before, which do not count.

    Returns:
        Milliseconds of each call, by name.
    """
    names = list(works)
    for name in names:
        for _ in range(warmup):
            works[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    with _garbage_stays():
        for count in range(repeats):
            for name in names if count % 2 == 0 else reversed(names):
                samples[name].append(time_call(works[name], device))
            passed = time.perf_counter() - began
            if seconds is not None and count + 1 >= MINIMUM_ROUNDS and passed > seconds * len(names):
                break
    return {name: Spread(tuple(values)) for name, values in samples.items()}


def time_call(work: Work, device: torch.device) -> float:
    """Return the milliseconds of one call, the device's work included."""
    if device.type == "cuda":
        wait(device)
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()  # on an idle device this is now
            work()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end)
    began = now(device)
    work()
    return 1e3 * (now(device) - began)


def now(device: torch.device) -> float:
    """Wait for the device and look at the host's clock, in seconds."""
    wait(device)
    return time.perf_counter()


def wait(device: torch.device) -> None:
    """Wait until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Watch for a new peak of memory on a GPU from here on."""
    if device.type == "cuda":
        free_memory(device)
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(device: torch.device) -> int:
    """Return the bytes that tensors hold on a GPU now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_gib(device: torch.device, *, besides: int = 0) -> float | str:
    """Return the peak since `forget_peak`; unknown ("") on a CPU, whose peak is that of the whole process.

    Args:
        device: of the peak.
        besides: bytes of it that belong to others.
    """
    return to_gib(torch.cuda.max_memory_allocated(device) - besides) if device.type == "cuda" else ""


def to_gib(number_of_bytes: float) -> float:
    """Bytes in GiB, to a MiB."""
    return round(number_of_bytes / 2**30, 3)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory, or the host's, was too small."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def _garbage_stays() -> Iterator[None]:
    """Keep Python's garbage collector from running within a call that is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
