"""Fit and speed of stage one at full size on one device, with random weights: images/s, memory, where the time goes.

    python -m eval.bootstrap_speed --size large --rows eval/results
    python -m eval.bootstrap_speed --size base --micro-batch 256 512 --images files --teacher online
    python -m eval.bootstrap_speed --size large --teacher store --images memory --kernels torch triton

Protocol `bootstrap-speed-2`: a few optimizer steps of the shipped configuration through the project's own Trainer,
compiled, bf16; the first quarter of them, in which kernels are compiled, is left out. `online`: the teacher sees every
crop; `store`: its outputs come from a teacher store. `files`: JPEG files are decoded and cut by workers; `memory`:
finished crops lie in memory, which shows what decoding costs. Hours are for 20 epochs of 1.28 million images.
The column `sampling` names the kernels; in rows of `bootstrap-speed-1` they only sampled.
"""

import argparse
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bootstrap_sizes import SIZES, draw_images, run_overrides
from sf_mllm.cores import count_cores
from sf_mllm.errors import CommandLineParser, InputError, report_input_errors
from sf_mllm.ops.kernels import KERNEL_NAMES

if TYPE_CHECKING:
    from sf_mllm.training.bootstrap.config import BootstrapConfig

PROTOCOL = "bootstrap-speed-2"
IMAGES_OF_A_FULL_TRAINING = 20 * 1.28e6
FIGURES = (
    "images_per_s",
    "hours_20_epochs",
    "peak_memory_gib",
    "startup_s",
    "step_ms",
    *(f"{phase}_share" for phase in ("data", "student", "teacher", "losses", "backward", "optimizer", "other")),
)
"""Measured columns."""


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.bootstrap_speed",
        description="Fit and speed of stage one at full size on one device, with random weights.",
    )
    parser.add_argument("--size", choices=SIZES, required=True, help="base: ViT-B/16, large: ViT-L/14, tiny: rehearsal")
    parser.add_argument("--teacher", nargs="+", choices=("online", "store"), default=["online", "store"])
    parser.add_argument("--images", nargs="+", choices=("memory", "files"), default=["memory", "files"])
    parser.add_argument("--micro-batch", nargs="+", type=int, help="images of one pass (default: one fitting the size)")
    parser.add_argument("--global-batch", type=int, default=512, help="images of an optimizer step (default 512)")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of each run (default 32)")
    parser.add_argument("--files", type=int, default=2048, help="JPEG files to draw (default 2048)")
    parser.add_argument("--file-size", type=int, default=400, help="side of the JPEG files in pixels (default 400)")
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNEL_NAMES, default=[KERNEL_NAMES[0]], help="what the student computes with"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, help="folder for files, store and runs (default: a temporary one)")
    parser.add_argument("--rows", type=Path, help="folder whose bootstrap_speed.csv the results are appended to")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    micro_batches = options.micro_batch or [size.micro_batch]
    for micro_batch in micro_batches:
        if micro_batch < 1 or options.global_batch % micro_batch:
            raise InputError(f"--micro-batch {micro_batch} must divide --global-batch {options.global_batch}.")
    if options.steps < 4:
        raise InputError(f"--steps {options.steps} is too few; give at least 4.")

    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        images = draw_images(work / "scenes", options.files, options.file_size)
        arrangements = itertools.product(options.teacher, options.images, micro_batches, options.kernels)
        for teacher, kept_as, micro_batch, kernels in arrangements:
            row = {
                "protocol": PROTOCOL,
                "size": options.size,
                "teacher": teacher,
                "images": f"{options.files} JPEG files of {options.file_size} px" if kept_as == "files" else "memory",
                "micro_batch": micro_batch,
                "global_batch": options.global_batch,
                "workers": count_cores(),
                "steps": options.steps,
                "compiled": options.compile,
                "sampling": kernels,
            }
            overrides = run_overrides(
                size,
                images=images,
                output_dir=Path(tempfile.mkdtemp(prefix=f"{teacher}-{kept_as}-{micro_batch}-", dir=work)),
                steps=options.steps,
                micro_batch=micro_batch,
                accumulation=options.global_batch // micro_batch,
                compiled=options.compile,
            )
            overrides += [f"train.dataloader_num_workers={count_cores()}", "store.crops=1"]
            overrides.append(f"student.kernels={kernels}")
            if teacher == "store":
                overrides.append(f"store.path={work / f'store-{options.size}'}")
            row |= measure(size.path, overrides, keep_in_memory=kept_as == "memory")
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if options.rows is not None:
                import torch

                from eval.rows import append_rows

                device = "cuda" if torch.cuda.is_available() else "cpu"
                append_rows("bootstrap_speed", [row], device, options.rows)
    return 0


def measure(config_file: str, overrides: Sequence[str], keep_in_memory: bool) -> dict[str, Any]:
    """Train for a few steps; what does not fit the device's memory is a result too."""
    import torch

    from sf_mllm.config import load_run_config
    from sf_mllm.training.bootstrap.config import BootstrapConfig
    from sf_mllm.training.progress import configure_logging

    configure_logging()
    try:
        row = {**train(load_run_config(BootstrapConfig, config_file, overrides), keep_in_memory), "outcome": "complete"}
    except torch.OutOfMemoryError:
        row = {**dict.fromkeys(FIGURES, ""), "outcome": "out of memory"}
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def train(config: "BootstrapConfig", keep_in_memory: bool) -> dict[str, Any]:
    """Run a configuration through the project's Trainer; return its `FIGURES`."""
    import torch

    from sf_mllm.training.arguments import make_training_arguments
    from sf_mllm.training.bootstrap.evaluation import describe_evaluation
    from sf_mllm.training.bootstrap.images import loader_defaults
    from sf_mllm.training.bootstrap.run import build_trainer
    from sf_mllm.training.environment import peak_memory_gib
    from sf_mllm.training.progress import report_progress
    from sf_mllm.training.reinforce.run import make_store
    from sf_mllm.training.run_folder import RunFolder

    if config.store.path is not None:
        make_store(config)
    run = RunFolder.open(config, config.output_dir)
    arguments = make_training_arguments(loader_defaults(config.train), run.checkpoints, config.seed)
    trainer, _ = build_trainer(config, run, arguments)
    if keep_in_memory:
        trainer.train_dataset = KeptInMemory(trainer.train_dataset, count=max(256, arguments.train_batch_size))
    report_progress(trainer, run, describe_evaluation)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    speed = trainer.times.summary()
    measured = speed["step_ms"] * speed["steps_measured"] / 1e3
    figures = {
        "images_per_s": speed["images_per_s"],
        "hours_20_epochs": round(IMAGES_OF_A_FULL_TRAINING / speed["images_per_s"] / 3600, 2),
        "peak_memory_gib": peak_memory_gib(),
        "startup_s": round(seconds - measured, 1),
        "step_ms": speed["step_ms"],
        **{f"{phase}_share": share for phase, share in speed["shares"].items()},
    }
    assert figures.keys() == set(FIGURES)
    return figures


class KeptInMemory:
    """The first samples of a run's data set, made once and given again and again; otherwise that data set.

    Args:
        dataset: of the run.
        count: samples to keep.
    """

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        self.samples = [dataset[position] for position in range(min(count, len(dataset)))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.samples[position % len(self.samples)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)


if __name__ == "__main__":
    sys.exit(main())
