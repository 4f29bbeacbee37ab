"""Stage two on several processes, a tenth of the rows text only: does every strategy end as one process does?

    python -m eval.instruct_scaling --processes 1 2 --kill --rows eval/results
    python -m eval.instruct_scaling --phase align --processes 1 2 --kill --rows eval/results

Protocol `instruct-scaling-1`: configs/finetune/demo.yaml, or demo_align.yaml of the phase before, on drawn scenes, of
which each tenth row has lost its image; every arrangement takes the same rows in the same steps, so that one process
accumulates what several share out. In fp32, or with --bf16 as the shipped DeepSpeed configurations say. With --kill,
runs on several processes are killed by SIGKILL after half of their steps and started again. Differences are against the
first arrangement. `loss_difference`: the largest relative one of logged losses. `weight_difference`: the distance
between what trained over its length; of adapters only their second matrices count, which start from zero.
"""

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from eval.scaling import (
    ROOT,
    check_arrangements,
    deepspeed_settings,
    find_device,
    list_arrangements,
    python_on,
)
from sf_mllm.errors import CommandLineParser, report_input_errors

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = "instruct-scaling-1"
CONFIGS = {"instruct": "demo.yaml", "align": "demo_align.yaml"}
"""By phase, in configs/finetune."""
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp")
FIGURES = ("samples_per_s", "peak_memory_gib", "held_out_loss", "loss_difference", "weight_difference")
"""Measured columns."""
_TEXT_ONLY_EVERY = 10
_HELD_OUT = 16
_LIMIT_S = 600


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.instruct_scaling",
        description="Stage two on several processes with text-only rows: equality with one process.",
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="one a GPU (default 1 2)")
    parser.add_argument("--phase", choices=CONFIGS, default="instruct", help="default: instruct")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of one pass (default 4)")
    parser.add_argument("--global-batch", type=int, default=16, help="rows of an optimizer step (default 16)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default 40)")
    parser.add_argument("--kill", action="store_true", help="kill runs on several processes half-way, and resume them")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 (default fp32)")
    parser.add_argument("--work", type=Path, help="folder for rows and runs (default: a temporary one)")
    parser.add_argument("--rows", type=Path, help="folder whose instruct_scaling.csv the results are appended to")
    options = parser.parse_args(argv)
    check_arrangements(options.processes, options.micro_batch, options.global_batch, options.steps)
    device = find_device(options.processes)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        # Less than an epoch: at its end several processes would fill up micro-batches with rows of its beginning.
        num_rows = options.steps * options.global_batch + _HELD_OUT
        data = draw_rows(work / "scenes", num_rows)
        reference: Path | None = None
        for count, strategy in list_arrangements(options.processes, options.strategy):
            folder = Path(tempfile.mkdtemp(prefix=f"{count}-{strategy}-", dir=work))
            accumulation = options.global_batch // (count * options.micro_batch)
            arguments = [
                str(ROOT / "configs" / "finetune" / CONFIGS[options.phase]),
                f"output_dir={folder / 'run'}",
                f"data.conversations={data / 'rows.json'}",
                f"data.image_root={data / 'images'}",
                f"data.held_out={_HELD_OUT}",
                f"train.max_steps={options.steps}",
                f"train.save_steps={max(1, options.steps // 4)}",
                "train.logging_steps=1",
                f"train.per_device_train_batch_size={options.micro_batch}",
                "train.per_device_eval_batch_size=1",
                f"train.gradient_accumulation_steps={accumulation}",
                "train.train_sampling_strategy=group_by_length",
                "train.gradient_checkpointing=true",
                f"train.bf16={str(options.bf16).lower()}",
            ]
            if strategy.startswith("zero"):
                arguments.append(f"train.deepspeed={deepspeed_settings(strategy, folder, autocast=options.bf16)}")
            kill_at = options.steps // 2 if options.kill and count > 1 else None
            outcome = launch(count, strategy, arguments, folder, kill_at)
            row = {
                "protocol": PROTOCOL,
                "phase": options.phase,
                "processes": count,
                "strategy": strategy,
                "precision": "bf16" if options.bf16 else "fp32",
                "micro_batch": options.micro_batch,
                "accumulation": accumulation,
                "steps": options.steps,
                "rows": num_rows,
                "text_only_rows": num_rows // _TEXT_ONLY_EVERY,
                "killed_at_step": "" if kill_at is None else kill_at,
                **(read_figures(folder / "run", reference) if outcome == "complete" else dict.fromkeys(FIGURES, "")),
                "outcome": outcome,
            }
            if reference is None and outcome == "complete":
                reference = folder / "run"
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if options.rows is not None:
                from eval.rows import append_rows

                append_rows("instruct_scaling", [row], device, options.rows, num_devices=count)
    return 0


def draw_rows(folder: Path, count: int) -> Path:
    """Draw scenes with one question each and take the image from every tenth row; return the folder of `rows.json`."""
    from sf_mllm.data.scenes.export import CONVERSATIONS_FILE, export_scenes

    export_scenes(folder, count=count, turns=1)
    rows = json.loads((folder / CONVERSATIONS_FILE).read_text(encoding="utf-8"))
    for row in rows[_TEXT_ONLY_EVERY - 1 :: _TEXT_ONLY_EVERY]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "").strip()
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def launch(processes: int, strategy: str, arguments: Sequence[str], folder: Path, kill_at: int | None) -> str:
    """Run the instruct command on so many processes, killed once if asked for; return how that ended."""
    command = python_on(processes)
    if strategy == "fsdp":
        settings = str(ROOT / "configs/accelerate/fsdp2_8_gpus.yaml")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings]
        command += ["--num_processes", str(processes), "--main_process_port", "0", "-m"]
    command += ["sf_mllm.training.instruct", *arguments]
    log = folder / "log.txt"
    code = _run(command, log, folder / "run" / "metrics.jsonl", kill_at)
    if kill_at is not None and code == -signal.SIGKILL:
        code = _run(command, log, folder / "run" / "metrics.jsonl", None)
        if code == 0 and "Resuming at step" not in log.read_text(encoding="utf-8"):
            return "began anew after it was killed"
    if code == 0:
        return "complete"
    print(log.read_text(encoding="utf-8"), file=sys.stderr)
    return f"failed with exit status {code}"


def _run(command: Sequence[str], log: Path, metrics: Path, kill_at: int | None) -> int:
    """Run a command, its output into a file; kill it and what it started at a logged step, or when it hangs."""
    with log.open("w", encoding="utf-8") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        end = time.monotonic() + _LIMIT_S
        while process.poll() is None:
            has_come_to_step = kill_at is not None and _count_lines(metrics) >= kill_at
            if has_come_to_step or time.monotonic() > end:
                for started in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        started.kill()
            time.sleep(0.05)
    return process.returncode


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def read_figures(run: Path, reference: Path | None) -> dict[str, Any]:
    """Return the `FIGURES` of a run; those that compare it are empty where it is itself the reference."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = dict.fromkeys(FIGURES, "") | {
        "samples_per_s": round(statistics.median(row["samples_per_s"] for row in _steps_of(run)), 2),
        "peak_memory_gib": record["peak_memory_gib"],
        "held_out_loss": round(record["held_out_loss"], 5),
    }
    if reference is not None:
        pairs = zip(_steps_of(run), _steps_of(reference), strict=True)
        figures["loss_difference"] = f"{max(abs(a['loss'] / b['loss'] - 1) for a, b in pairs):.2e}"
        figures["weight_difference"] = f"{_compare_weights(run, reference):.2e}"
    return figures


def _steps_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def _compare_weights(run: Path, reference: Path) -> float:
    ours, theirs = (_trained_weights(folder) for folder in (run, reference))
    return ((ours - theirs).norm() / theirs.norm()).item()


def _trained_weights(run: Path) -> "Tensor":
    import torch
    from safetensors.torch import load_file

    adapter = run / "adapter" / "adapter_model.safetensors"
    is_adapter = adapter.is_file()
    weights = load_file(adapter if is_adapter else run / "projector" / "projector.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if not is_adapter or "lora_B" in name])


if __name__ == "__main__":
    sys.exit(main())
