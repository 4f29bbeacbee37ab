"""Where the time of our encoder goes on a CUDA device, and what each part would take at the device's best.

    python -m eval.profile_encoder --size large --batch 256 --rows eval/results

Protocol `encoder-profile-1`: random weights of a published size, drawings, bfloat16, compiled. `call` is the mean of
calls one after the other, not waited for in between. The others are kernels of as many calls under PyTorch's profiler,
told apart by their names. A floor is the larger of two times: operations over the device's dense bfloat16 peak, and
bytes that must be read or written over the peak of its memory. It takes each part as fused as it can be by itself: an
addition goes with the norm behind it, an activation reads and writes once; where a kernel of ours multiplies and
activates, its time is one of linear layers. `others` has no floor: coordinates in float32, copies, and what the names
do not tell.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from eval.rows import append_rows
from sf_mllm.bench.images import Images
from sf_mllm.bench.our_towers import EncoderTokens, find_published_encoder
from sf_mllm.bench.precision import computing_in, prepare_variant
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.cortex import MLP, Attention
from sf_mllm.encoder.mixing import AdaptiveMixing
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.stem import Stem, StemConvolution
from sf_mllm.errors import CommandLineParser, InputError, report_input_errors
from sf_mllm.ops.kernels import KERNEL_NAMES

PROTOCOL = "encoder-profile-1"
PEAKS = {"H200": (989.0, 4.8), "H100 80GB HBM3": (989.0, 3.35), "A100-SXM4-80GB": (312.0, 2.04)}
"""By a part of the device's name: dense bfloat16 TFLOP/s and TB/s, from NVIDIA's data sheets."""

CALL = "call"
PRODUCTS, ATTENTION, MIXING, STEM = "linear layers", "attention", "sampling and mixing", "stem"
NORMS, ACTIVATIONS, OTHERS = "norms and sums", "activations", "others"
PARTS = (PRODUCTS, ATTENTION, MIXING, STEM, NORMS, ACTIVATIONS, OTHERS)

_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (OTHERS, ("memset", "memcpy", "f32f32_f32f32", "_sin_", "_cos_")),  # coordinates are in float32
    (STEM, ("_stem_kernel", "_repack_kernel", "_convolve_kernel", "_pool_kernel")),
    (STEM, ("convolution", "max_pool2d", "fprop_optimized", "nhwcaddpadding")),
    (ATTENTION, ("_attend_kernel", "sdpa", "flash", "fmha")),
    (MIXING, ("_mix_kernel", "_sample_kernel", "grid_sampler")),
    (PRODUCTS, ("_linear_activation_kernel", "nvjet", "gemm", "cutlass", "cublas", "splitk")),
    (ACTIVATIONS, ("_gelu_", "_sigmoid_", "_erf_")),
    (NORMS, ("layer_norm",)),
)
"""Words in the names of kernels, the first that fits."""


@dataclass
class Work:
    """What a part must do at least: operations, and bytes that go through the memory."""

    operations: float = 0.0
    bytes: float = 0.0

    def floor_ms(self, tflops: float, terabytes_per_s: float) -> float:
        """Return the time it takes on a device of these peaks."""
        return max(self.operations / tflops, self.bytes / terabytes_per_s) / 1e9


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.profile_encoder", description="Where the time of our encoder goes on a CUDA device."
    )
    parser.add_argument("--size", nargs="+", default=["large"], help="published sizes (default: large)")
    parser.add_argument("--batch", nargs="+", type=int, default=[256], help="images of a call (default: 256)")
    parser.add_argument("--kernels", nargs="+", choices=KERNEL_NAMES, default=["triton"], help="default: triton")
    parser.add_argument("--calls", type=int, default=50, help="one after the other (default: 50)")
    parser.add_argument("--peak", nargs=2, type=float, metavar=("TFLOPS", "TBPS"), help="of a device not known here")
    parser.add_argument("--table", type=Path, help="folder for a list of all kernels")
    parser.add_argument("--rows", type=Path, help="folder whose encoder_profile.csv the results are appended to")
    options = parser.parse_args(argv)
    if min(*options.batch, options.calls) < 1:
        raise InputError("--batch and --calls must be at least 1.")
    if not torch.cuda.is_available():
        raise InputError("A profile needs a CUDA device, and there is none; python -m sf_mllm.bench measures CPUs.")
    device = torch.device("cuda")
    peak = options.peak or _find_peak(torch.cuda.get_device_name(device))
    for size, batch, kernels in itertools.product(options.size, options.batch, options.kernels):
        config, compiled, pixels = make_call(size, batch, kernels, device)
        with computing_in("bfloat16", device):
            call_ms, kernel_times = measure(lambda c=compiled, p=pixels: c(p), options.calls, device)
        rows = make_rows(call_ms, kernel_times, work_of(config, batch, pixels.shape[-2:]), peak)
        shared = {"protocol": PROTOCOL, "size": size, "kernels": kernels, "precision": "bfloat16", "batch": batch}
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in (shared | row).items()), flush=True)
        if options.table is not None:
            _write_table(options.table / f"{size}-{batch}-{kernels}.txt", kernel_times)
        if options.rows is not None:
            append_rows("encoder_profile", [shared | row for row in rows], "cuda", options.rows)
    return 0


def part_of(kernel: str) -> str:
    """Return the part that a kernel works for, by its name."""
    lowered = kernel.lower()
    return next((part for part, words in _NAMES if any(word in lowered for word in words)), OTHERS)


def work_of(
    config: SparseFormerConfig, batch: int, image_size: Sequence[int], bytes_per_value: int = 2
) -> dict[str, Work]:
    """Count what each part of an encoder must do for a batch; nothing is computed.

    Args:
        config: of the encoder.
        batch: images.
        image_size: height and width.
        bytes_per_value: of weights and activations.
    """
    work = {part: Work() for part in PARTS}

    def add(part: str, values: float, operations: float = 0.0) -> None:
        work[part].bytes += values * bytes_per_value
        work[part].operations += operations

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = inputs[0] if inputs else output  # what starts the tokens is given nothing
        match module:
            case StemConvolution():
                add(STEM, 0, 2 * output.numel() * module.weight[0].numel())
            case Stem():  # the convolution's result need not leave the chip
                add(STEM, given.numel() + output.numel())
            case nn.Linear():
                add(
                    PRODUCTS,
                    given.numel() + output.numel() + module.weight.numel(),
                    2 * given.numel() * module.out_features,
                )
            case Attention():
                add(ATTENTION, 4 * output.numel(), 4 * output.numel() * output.shape[1])
            case AdaptiveMixing():
                outputs = module.num_output_points * module.channels
                generated = inputs[2].numel() / output.shape[-1] * module.generate.out_features
                tokens = output.numel() / output.shape[-1]
                products = module.num_points * module.channels**2 + outputs * module.num_points
                add(MIXING, given.numel() + generated + tokens * outputs, 2 * tokens * products)
            case nn.LayerNorm():  # the stream and a branch in, the stream and its norm out
                add(NORMS, 4 * output.numel())
            case MLP():
                add(ACTIVATIONS, 2 * output.numel() / output.shape[-1] * module.fc1.out_features)

    watch_modules(config, batch, image_size, watch)
    return work


def watch_modules(
    config: SparseFormerConfig,
    batch: int,
    image_size: Sequence[int],
    watch: Callable[[nn.Module, tuple[Any, ...], Any], None],
) -> None:
    """Show every module that a batch calls, with its inputs and output, of which only the sizes are there.

    Args:
        config: of the encoder.
        batch: images.
        image_size: height and width.
        watch: a forward hook.
    """
    with torch.device("meta"):
        model = SparseFormerModel(config).eval()
        pixels = torch.empty(batch, 3, *image_size)
    for module in model.modules():
        module.register_forward_hook(watch)
    with torch.no_grad():
        model(pixels)


def measure(call: Callable[[], Tensor], calls: int, device: torch.device) -> tuple[float, dict[str, tuple[int, float]]]:
    """Time calls one after the other, then profile as many.

    Args:
        call: what is measured.
        calls: how many.
        device: where; on a CPU the operations of PyTorch stand for kernels.

    Returns:
        Milliseconds of a call; by name the kernels' number and milliseconds of one call.
    """
    is_cuda = device.type == "cuda"
    for _ in range(max(3, calls // 2)):  # until compiled, and as warm as it gets
        call()
    elapsed = _time(call, calls) if is_cuda else float("nan")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        if is_cuda:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    kernels: dict[str, tuple[int, float]] = {}
    events: Iterable[Any] = profiler.events() or ()
    for event in events:
        if event.device_type == wanted:
            count, total = kernels.get(event.name, (0, 0.0))
            time_us = event.time_range.elapsed_us() if is_cuda else event.self_cpu_time_total
            kernels[event.name] = (count + 1, total + time_us / 1e3 / calls)
    return elapsed, kernels


def make_rows(
    call_ms: float, kernels: dict[str, tuple[int, float]], work: dict[str, Work], peak: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the call and its parts as rows.

    Args:
        call_ms: of `measure`.
        kernels: of `measure`.
        work: of `work_of`.
        peak: TFLOP/s and TB/s.
    """
    times = dict.fromkeys(PARTS, 0.0)
    for name, (_, milliseconds) in kernels.items():
        times[part_of(name)] += milliseconds
    floors = {part: work[part].floor_ms(*peak) for part in PARTS if part != OTHERS}
    rows: list[dict[str, Any]] = [_row(CALL, call_ms, sum(floors.values()), peak)]
    return rows + [_row(part, times[part], floors.get(part), peak) for part in PARTS]


def _row(part: str, time_ms: float, floor_ms: float | None, peak: Sequence[float]) -> dict[str, Any]:
    floor: float | str = "" if floor_ms is None else round(floor_ms, 3)
    return {
        "part": part,
        "time_ms": round(time_ms, 3),
        "floor_ms": floor,
        "peak_tflops": peak[0],
        "peak_tb_per_s": peak[1],
        "outcome": "complete",
    }


def _time(call: Callable[[], Tensor], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def make_call(
    size: str, batch: int, kernels: str, device: torch.device
) -> tuple[SparseFormerConfig, Callable[[Tensor], Tensor], Tensor]:
    """Return the configuration of a published size, its encoder compiled in bfloat16, and what to call it with."""
    torch._dynamo.reset()
    tower = find_published_encoder(size)(None)
    assert isinstance(tower.module, EncoderTokens)
    compiled = prepare_variant(tower.module, "bfloat16", "compiled", device, kernels)
    drawn = Images().pixels(batch, ImageSize(*tower.size))
    return tower.module.encoder.config, compiled, tower.normalise(drawn).to(device, torch.bfloat16)


def _find_peak(device_name: str) -> tuple[float, float]:
    for known, peak in PEAKS.items():
        if known in device_name:
            return peak
    raise InputError(
        f"The peaks of '{device_name}' are not known here; give --peak with its dense bfloat16 TFLOP/s and the TB/s of "
        "its memory."
    )


def _write_table(path: Path, kernels: dict[str, tuple[int, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    lines = (
        f"{milliseconds:9.3f} ms {count:6d} x {part_of(name):20} {name}" for name, (count, milliseconds) in ordered
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
