"""Fit and speed of stage two at full size on one device, with random weights: tokens/s, samples/s, memory, hours.

    python -m eval.instruct_speed --size full --rows eval/results

Protocol `instruct-speed-1`: optimizer steps of configs/finetune/vicuna_7b.yaml (LoRA of rank 128, rows of up to 2048
tokens, activation checkpointing, bf16) through the project's own Trainer, on the mix of a LLaVA run in batches of
similar lengths (`eval/instruct_rows.py`). `sparseformer`: the large encoder, 64 tokens an image, and a language model
of Llama-7B's shape; `sparseformer_qlora`: the same with the language model in 4 bits; `patches`: transformers' LLaVA
with all 576 patches of a ViT-L/14 at 336 px. Each first takes a few steps that are not counted, among them that of the
longest rows. Tokens are those of the rows, visual ones included and padding left out. The peak of memory comes from the
longest rows, which are text only and alike for all; the median of the peaks of the steps is about images. Hours are for
the 665,298 rows of the mix on 8 such devices, without the time that they need to talk to each other.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sf_mllm.errors import CommandLineParser, InputError, report_input_errors

PROTOCOL = "instruct-speed-1"
CONFIG = Path(__file__).parents[1] / "configs" / "finetune" / "vicuna_7b.yaml"
MODELS = ("sparseformer", "patches", "sparseformer_qlora")
FIGURES = (
    "tokens_per_s",
    "samples_per_s",
    "hours_665k_rows_8_devices",
    "step_ms",
    "peak_memory_gib",
    "median_memory_gib",
    "tokens_per_row",
    "padding_share",
    "trained_parameters",
)
"""Measured columns."""
_WARMUP_STEPS = 6


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m eval.instruct_speed",
        description="Fit and speed of stage two at full size on one device, with random weights.",
    )
    parser.add_argument("--size", choices=("full", "tiny"), required=True, help="tiny: rehearsal on a CPU")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[16], help="rows of a step (default 16)")
    parser.add_argument("--steps", type=int, default=48, help="steps that are measured (default 48)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", type=Path, help="folder for runs and a decoder (default: a temporary one)")
    parser.add_argument("--rows", type=Path, help="folder whose instruct_speed.csv the results are appended to")
    options = parser.parse_args(argv)
    if options.steps < 2 or min(options.micro_batch) < 1:
        raise InputError(
            f"--steps {options.steps} and --micro-batch {min(options.micro_batch)} are too few; give at least 2 and 1."
        )

    import torch

    from eval.rows import append_rows
    from sf_mllm.bench.random_models import SIZES, count_visual_tokens
    from sf_mllm.training.progress import configure_logging

    configure_logging()
    size = SIZES[options.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for model in options.model:
            for micro_batch in options.micro_batch:
                row = {
                    "protocol": PROTOCOL,
                    "size": options.size,
                    "model": model,
                    "visual_tokens": count_visual_tokens(size, model),
                    "max_length": size.max_length,
                    "micro_batch": micro_batch,
                    "steps": options.steps,
                    "activation_checkpointing": options.checkpointing,
                    **measure(options, model, micro_batch, work, device),
                }
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                if options.rows is not None:
                    append_rows("instruct_speed", [row], device.type, options.rows)
    return 0


def measure(options: argparse.Namespace, model: str, micro_batch: int, work: Path, device: Any) -> dict[str, Any]:
    """Train for a few steps; what does not fit the device's memory, or cannot be had here, is a result too."""
    import torch

    nothing = dict.fromkeys(FIGURES, "")
    try:
        row = {**train(options, model, micro_batch, work, device), "outcome": "complete"}
    except torch.OutOfMemoryError:
        row = {**nothing, "outcome": "out of memory"}
    except InputError as error:
        row = {**nothing, "outcome": str(error)}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def train(options: argparse.Namespace, model: str, micro_batch: int, work: Path, device: Any) -> dict[str, Any]:
    """Build a model and train it; return its `FIGURES`.

    Raises:
        InputError: the model needs a library or a device that is not here.
    """
    import torch
    from transformers import TrainerCallback, set_seed

    from eval.instruct_rows import MIX_ROWS, MixRows
    from sf_mllm.bench.random_models import SIZES, count_visual_tokens, join_sparseformer, join_stock_llava
    from sf_mllm.bench.timing import forget_peak, now
    from sf_mllm.config import load_run_config
    from sf_mllm.data.collate import ConversationCollator
    from sf_mllm.training.arguments import make_training_arguments
    from sf_mllm.training.environment import peak_memory_gib
    from sf_mllm.training.instruct.config import InstructConfig
    from sf_mllm.training.instruct.length_groups import LengthGroupedSampler
    from sf_mllm.training.instruct.trainer import InstructTrainer
    from sf_mllm.training.progress import report_progress
    from sf_mllm.training.run_folder import RunFolder
    from sf_mllm.vlm.adapters import add_adapters

    class Watch(TrainerCallback):
        """Notes when the steps that count begin and end, and the peak of memory in each."""

        def __init__(self) -> None:
            self.began = self.ended = 0.0
            self.peaks: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == _WARMUP_STEPS:
                self.began = now(device)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.peaks.append(peak_memory_gib())
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended = now(device)

    size = SIZES[options.size]
    folder = Path(tempfile.mkdtemp(prefix=f"{model}-{micro_batch}-", dir=work))
    config = load_run_config(
        InstructConfig,
        CONFIG,
        [
            f"output_dir={folder / 'run'}",
            "encoder=random",
            "data.conversations=random",
            f"train.max_steps={_WARMUP_STEPS + options.steps}",
            f"train.per_device_train_batch_size={micro_batch}",
            "train.gradient_accumulation_steps=1",
            f"train.gradient_checkpointing={str(options.checkpointing).lower()}",
            f"train.logging_steps={max(1, options.steps // 6)}",
            "train.save_strategy=no",
            "train.train_sampling_strategy=sequential",
            f"train.bf16={str(device.type == 'cuda').lower()}",
            f"train.dataloader_num_workers={4 if device.type == 'cuda' else 0}",
        ],
    )
    assert config.lora is not None and config.projector_learning_rate is not None
    set_seed(0)
    print(f"Building {model} at micro-batch {micro_batch}", flush=True)
    decoder = _make_decoder(size, model, folder, device)
    joined: Any
    if model == "patches":
        joined, image_size = join_stock_llava(size, decoder, device), size.clip["image_size"]
    else:
        joined, image_size = join_sparseformer(size, decoder, device), size.image_size
    joined.is_loaded_in_4bit = model == "sparseformer_qlora"  # PEFT looks for it on the whole model
    adapted = add_adapters(joined, rank=config.lora.rank, alpha=config.lora.alpha, dropout=config.lora.dropout)

    dataset = MixRows(
        options.steps * micro_batch, size, visual_tokens=count_visual_tokens(size, model), image_size=image_size
    )
    order = list(LengthGroupedSampler(dataset.lengths, batch_size=micro_batch, seed=0, epoch=lambda: 0))
    run = RunFolder.open(config, config.output_dir)
    trainer = InstructTrainer(
        projector_learning_rate=config.projector_learning_rate,
        model=adapted,
        args=make_training_arguments(config.train, run.checkpoints, config.seed),
        train_dataset=torch.utils.data.Subset(dataset, (order * _WARMUP_STEPS)[: _WARMUP_STEPS * micro_batch] + order),
        data_collator=ConversationCollator(pad_token_id=0),
    )
    watch = Watch()
    trainer.add_callback(watch)
    report_progress(trainer, run)
    forget_peak(device)  # of building the model
    trainer.train()
    seconds = watch.ended - watch.began
    tokens, lengths = sum(dataset.lengths), [dataset.lengths[row] for row in order]
    padded = sum(
        micro_batch * max(lengths[start : start + micro_batch]) for start in range(0, len(lengths), micro_batch)
    )
    samples_per_s = len(dataset) / seconds
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "samples_per_s": round(samples_per_s, 3),
        "hours_665k_rows_8_devices": round(MIX_ROWS / samples_per_s / 8 / 3600, 2),
        "step_ms": round(1e3 * seconds / options.steps, 1),
        "peak_memory_gib": max(watch.peaks),
        "median_memory_gib": median(watch.peaks[_WARMUP_STEPS:]),
        "tokens_per_row": round(tokens / len(dataset), 1),
        "padding_share": round(1 - tokens / padded, 4),
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
    }


def _make_decoder(size: Any, model: str, folder: Path, device: Any) -> Any:
    """Return a random decoder; for QLoRA it goes over the disk, where transformers quantises while it loads."""
    from transformers import AutoModelForCausalLM

    from sf_mllm.bench.random_models import make_decoder
    from sf_mllm.training.instruct.quantization import make_quantization_config

    if model != "sparseformer_qlora":
        return make_decoder(size, device)
    quantization = make_quantization_config()
    make_decoder(size, device).save_pretrained(folder / "decoder")
    gc.collect()
    return AutoModelForCausalLM.from_pretrained(
        folder / "decoder", dtype=size.dtype, quantization_config=quantization, device_map={"": device}
    )


if __name__ == "__main__":
    sys.exit(main())
