"""Stage one on several GPUs: speed beside one process, and whether the result is the same at the same global batch.

    python -m eval.bootstrap_scaling --size large --processes 1 2 --rows eval/results

Protocol `bootstrap-scaling-1`: the shipped configuration with random weights, started with torchrun; every arrangement
takes the same images in the same steps and micro-batches of the same size, so that one process accumulates what several
share out. Differences are against the first arrangement. `loss_difference`: the largest relative one of logged losses.
`weight_difference_mean`: the distance between all final weights over the distance that training moved them.
`weight_difference`: the same for each tensor, the largest, which is one whose gradients are almost zero. In fp32 on two
CPU processes they are 1e-7, 1e-5 and 2e-3 after four steps: sums in another order.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bootstrap_sizes import SIZES, draw_images, run_overrides
from eval.scaling import ROOT, check_arrangements, deepspeed_settings, find_device, list_arrangements, python_on
from sf_mllm.cores import count_cores
from sf_mllm.errors import CommandLineParser, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = "bootstrap-scaling-1"


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.bootstrap_scaling",
        description="Stage one on several GPUs with random weights: speed, and equality with one process.",
    )
    parser.add_argument("--size", choices=SIZES, required=True, help="base: ViT-B/16, large: ViT-L/14, tiny: rehearsal")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="one a GPU (default 1 2)")
    parser.add_argument("--strategy", nargs="+", choices=("ddp", "zero2"), default=["ddp", "zero2"])
    parser.add_argument("--micro-batch", type=int, help="images of one pass (default: one fitting the size)")
    parser.add_argument("--global-batch", type=int, default=1024, help="images of an optimizer step (default 1024)")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run (default 24)")
    parser.add_argument("--files", type=int, default=2048, help="JPEG files to draw (default 2048)")
    parser.add_argument("--file-size", type=int, default=224, help="side of the JPEG files in pixels (default 224)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, help="folder for files and runs (default: a temporary one)")
    parser.add_argument("--rows", type=Path, help="folder whose bootstrap_scaling.csv the results are appended to")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    micro_batch = options.micro_batch or size.micro_batch
    check_arrangements(options.processes, micro_batch, options.global_batch, options.steps)
    device = find_device(options.processes)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        images = draw_images(work / "scenes", options.files, options.file_size)
        reference: Path | None = None
        for count, strategy in list_arrangements(options.processes, options.strategy):
            folder = Path(tempfile.mkdtemp(prefix=f"{count}-{strategy}-", dir=work))
            accumulation = options.global_batch // (count * micro_batch)
            overrides = run_overrides(
                size,
                images=images,
                output_dir=folder / "run",
                steps=options.steps,
                micro_batch=micro_batch,
                accumulation=accumulation,
                compiled=options.compile,
            )
            overrides.append(f"train.dataloader_num_workers={max(1, count_cores() // count)}")
            if strategy == "zero2":
                overrides.append(f"train.deepspeed={deepspeed_settings(strategy, folder, autocast=device == 'cuda')}")
            outcome = launch(count, [size.path, *overrides], log=folder / "log.txt")
            row = {
                "protocol": PROTOCOL,
                "size": options.size,
                "processes": count,
                "strategy": strategy,
                "micro_batch": micro_batch,
                "accumulation": accumulation,
                "global_batch": options.global_batch,
                "steps": options.steps,
                "compiled": options.compile,
                **(read_figures(folder / "run", reference) if outcome == "complete" else dict.fromkeys(FIGURES, "")),
                "outcome": outcome,
            }
            if reference is None and outcome == "complete":
                reference = folder / "run"
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if options.rows is not None:
                from eval.rows import append_rows

                append_rows("bootstrap_scaling", [row], device, options.rows, num_devices=count)
    return 0


def launch(processes: int, arguments: Sequence[str], log: Path) -> str:
    """Run the bootstrap command on so many processes, its output into a file; return how that ended."""
    command = [*python_on(processes), "sf_mllm.training.bootstrap", *arguments]
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code == 0:
        return "complete"
    text = log.read_text(encoding="utf-8")
    print(text, file=sys.stderr)
    return "out of memory" if "OutOfMemoryError" in text else f"failed with exit status {code}"


FIGURES = (
    "images_per_s",
    "step_ms",
    "data_share",
    "backward_share",
    "peak_memory_gib",
    "speedup",
    "loss_difference",
    "weight_difference",
    "weight_difference_mean",
)
"""Measured columns."""


def read_figures(run: Path, reference: Path | None) -> dict[str, Any]:
    """Return the `FIGURES` of a run; those that compare it are empty where it is itself the reference."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    speed = record["speed"]
    figures = dict.fromkeys(FIGURES, "") | {
        "images_per_s": speed["images_per_s"],
        "step_ms": speed["step_ms"],
        "data_share": speed["shares"]["data"],
        "backward_share": speed["shares"]["backward"],
        "peak_memory_gib": record["peak_memory_gib"],
    }
    if reference is not None:
        before = json.loads((reference / "run.json").read_text(encoding="utf-8"))
        largest, mean = _compare_weights(run, reference)
        figures |= {
            "speedup": round(speed["images_per_s"] / before["speed"]["images_per_s"], 3),
            "loss_difference": f"{_compare_losses(run, reference):.2e}",
            "weight_difference": f"{largest:.2e}",
            "weight_difference_mean": f"{mean:.2e}",
        }
    return figures


def _compare_losses(run: Path, reference: Path) -> float:
    """Largest relative difference between losses logged at the same steps."""
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (run, reference)
    )
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if "loss" in b]
    assert pairs and all(a["step"] == b["step"] for a, b in pairs)
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)


def _compare_weights(run: Path, reference: Path) -> tuple[float, float]:
    """How far final weights are apart, over how far the reference moved: largest of a tensor, and of all at once."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "encoder" / "model.safetensors") for folder in (run, reference))
    start = _start_weights(reference)
    apart = {name: (ours[name] - theirs[name]).norm() for name in start}
    moved = {name: (theirs[name] - start[name]).norm() for name in start}
    largest = max((apart[name] / moved[name]).item() for name in start if moved[name] > 0)
    return largest, (_norm(apart) / _norm(moved)).item()


def _start_weights(run: Path) -> "dict[str, Tensor]":
    """Build the student of a run as it was before the first step."""
    from sf_mllm.config import load_run_config
    from sf_mllm.training.bootstrap.config import BootstrapConfig
    from sf_mllm.training.bootstrap.student import build_student
    from sf_mllm.training.bootstrap.teachers import load_teacher

    config = load_run_config(BootstrapConfig, run / "config.yaml")
    return dict(build_student(config, load_teacher(config.teacher))[0].state_dict())


def _norm(norms: "dict[str, Tensor]") -> "Tensor":
    import torch

    return torch.stack(list(norms.values())).norm()


if __name__ == "__main__":
    sys.exit(main())
