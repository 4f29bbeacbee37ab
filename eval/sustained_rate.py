"""Does the device keep its rate up? Our encoder, and its linear layers alone, called a few times and for long.

    python -m eval.sustained_rate --size large --rows eval/results

Protocol `sustained-rate-1`: random weights of a published size, drawings, bfloat16, compiled, with kernels; `products`
are the linear layers of one call, each multiplying random values. Both are replayed as CUDA graphs, calls one right
after the other, after two seconds without any. Times are of single calls, by CUDA events. Clock and power are medians
of NVML's readings while the calls are made, one every 10 ms; its power is an average over some time before, so that it
is too low for few calls. Where the clock falls while the power stands at what the device may draw, that is what limits
the rate.
"""

import itertools
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.profile_encoder import make_call, watch_modules
from eval.rows import append_rows
from sf_mllm.bench.precision import computing_in
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.errors import CommandLineParser, InputError, report_input_errors
from sf_mllm.ops.kernels import KERNEL_NAMES

PROTOCOL = "sustained-rate-1"
ENCODER, LAYERS = "encoder", "products"

_REST_S = 2.0
_READING_S = 0.01


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.sustained_rate", description="Our encoder and its products, called briefly and for long."
    )
    parser.add_argument("--size", nargs="+", default=["large"], help="published sizes (default: large)")
    parser.add_argument("--batch", type=int, default=256, help="images of a call (default: 256)")
    parser.add_argument("--kernels", choices=KERNEL_NAMES, default="triton", help="default: triton")
    parser.add_argument("--calls", nargs="+", type=int, default=[3, 30, 300], help="in a row (default: 3 30 300)")
    parser.add_argument("--rows", type=Path, help="folder whose sustained_rate.csv the results are appended to")
    options = parser.parse_args(argv)
    if min(options.batch, *options.calls) < 1:
        raise InputError("--batch and --calls must be at least 1.")
    if not torch.cuda.is_available():
        raise InputError("A rate needs a CUDA device to be kept up by, and there is none.")
    device = torch.device("cuda")
    try:
        torch.cuda.clock_rate(device)
    except (ImportError, RuntimeError) as error:
        raise InputError("Clock and power cannot be read without NVML; pip install nvidia-ml-py.") from error
    for size in options.size:
        config, compiled, pixels = make_call(size, options.batch, options.kernels, device)
        sizes = linear_sizes(config, options.batch, pixels.shape[-2:])
        products = sum(2 * rows * inputs * outputs for rows, inputs, outputs, _ in sizes)
        works = {
            ENCODER: (lambda c=compiled, p=pixels: c(p), None),
            LAYERS: (make_products(sizes, device), products),
        }
        shared = {"protocol": PROTOCOL, "size": size, "kernels": options.kernels, "precision": "bfloat16"}
        for name, (call, operations) in works.items():
            with computing_in("bfloat16", device):
                replay = _record(call)
                for calls in options.calls:
                    row = {**shared, "batch": options.batch, "work": name, **measure(replay, calls, operations)}
                    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    if options.rows is not None:
                        append_rows("sustained_rate", [row], "cuda", options.rows)
    return 0


def linear_sizes(config: SparseFormerConfig, batch: int, image_size: Sequence[int]) -> list[tuple[int, int, int, bool]]:
    """Return rows, inputs, outputs and whether there is a bias of each linear layer that a batch calls, in order.

    Args:
        config: of the encoder.
        batch: images.
        image_size: height and width.
    """
    sizes: list[tuple[int, int, int, bool]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear):
            rows = inputs[0].numel() // module.in_features
            sizes.append((rows, module.in_features, module.out_features, module.bias is not None))

    watch_modules(config, batch, image_size, note)
    return sizes


def make_products(
    sizes: Sequence[tuple[int, int, int, bool]], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Tensor]:
    """Return a call that multiplies random values as linear layers do, and returns the last product.

    Args:
        sizes: of `linear_sizes`; layers of one size share their values.
        device: where.
        dtype: of all values.
    """
    values = {
        size: [
            torch.randn(size[0], size[1], device=device, dtype=dtype),
            torch.randn(size[2], size[1], device=device, dtype=dtype) * size[1] ** -0.5,
            torch.randn(size[2], device=device, dtype=dtype) if size[3] else None,
        ]
        for size in set(sizes)
    }

    def multiply() -> Tensor:
        for size in sizes:
            product = F.linear(*values[size])  # type: ignore[arg-type]
        return product

    return multiply


def measure(replay: Callable[[], Any], calls: int, operations: float | None) -> dict[str, Any]:
    """Let the device rest, then time calls one right after the other.

    Args:
        replay: what is timed; it must not wait for the device.
        calls: how many.
        operations: of a call; None: not known.
    """
    torch.cuda.synchronize()
    time.sleep(_REST_S)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    with _readings() as readings:
        events[0].record()
        for event in events[1:]:
            replay()
            event.record()
        torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    median = statistics.median(times)
    clocks, powers = zip(*readings, strict=True)
    return {
        "calls": calls,
        "first_ms": round(times[0], 3),
        "median_ms": round(median, 3),
        "last_ms": round(times[-1], 3),
        "tflops": "" if operations is None else round(operations / median / 1e9),
        "clock_mhz": round(statistics.median(clocks)),
        "power_w": round(statistics.median(powers)),
        "outcome": "complete",
    }


@contextmanager
def _readings() -> Iterator[list[tuple[float, float]]]:
    """Collect the device's clock in MHz and its power in W until the block ends, at least once."""
    readings: list[tuple[float, float]] = []
    is_over = threading.Event()

    def read() -> None:
        while True:
            readings.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3))
            if is_over.wait(_READING_S):
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield readings
    finally:
        is_over.set()
        thread.join()


def _record(call: Callable[[], Any]) -> Callable[[], None]:
    """Record a call as a CUDA graph, after a few that compile it."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


if __name__ == "__main__":
    sys.exit(main())
