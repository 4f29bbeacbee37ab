"""Train the small language model that ships as the demo's decoder, from scratch on text about procedural scenes.

It reads a text that lists the objects of a scene and answers questions about it; later, stage two puts visual tokens in
the place of that text. Command: `python -m scripts.demo.train_decoder --out DIR --seconds 240`.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from eval.scene_qa import answer_from_texts, format_results, held_out_questions, score
from scripts.demo.decoder_data import encode_scenes, train_tokenizer
from scripts.demo.shared import Budget, refuse_used_directory
from sf_mllm.errors import report_input_errors
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.progress import ProgressReporter, configure_logging
from sf_mllm.training.run_folder import write_directory_atomically

logger = logging.getLogger("sf_mllm.demo")

_NO_LIMIT = 1_000_000


def build_decoder(tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Make a Llama of a few million parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class StopWhenSpent(TrainerCallback):
    """Ends training when the time is up; until then, keeps the expected number of steps right for the progress line."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, or estimate how many steps the time allows."""
        spent = self.budget.spent(state.global_step)
        control.should_training_stop |= spent >= 1
        if self.budget.seconds is not None:
            state.max_steps = max(round(state.global_step / spent), state.global_step)


class DecoderTrainer(Trainer):
    """Trainer whose learning rate follows a budget."""

    def __init__(self, *, budget: Budget, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.budget = budget

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Follow the budget instead of a number of steps."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, self.budget.learning_rate_factor
            )
        return self.lr_scheduler


def train(options: argparse.Namespace) -> None:
    """Train, save and evaluate a decoder."""
    out = Path(options.out)
    refuse_used_directory(out)
    log = Path(options.log) if options.log else out.with_name(f"{out.name}.metrics.jsonl")
    began = time.monotonic()
    tokenizer = train_tokenizer(options.seed)
    dataset = encode_scenes(
        tokenizer, options.scenes, seed=options.seed, max_length=options.max_length, workers=options.workers
    )
    is_padding = dataset.input_ids == tokenizer.pad_token_id
    logger.info(
        "%d conversations made in %.0f s; %.0f%% of the positions are padding, %.0f%% of the conversations are cut.",
        len(dataset),
        time.monotonic() - began,
        100 * is_padding.float().mean(),
        100 * (~is_padding[:, -1]).float().mean(),
    )

    set_seed(options.seed)
    model = build_decoder(tokenizer, hidden_size=options.hidden_size, layers=options.layers, heads=options.heads)
    budget = Budget(options.steps, options.seconds)
    train_arguments = {
        "max_steps": options.steps or _NO_LIMIT,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_steps": options.logging_steps,
        "dataloader_drop_last": True,
        "torch_compile": options.compile,
    }
    if options.device == "cpu":
        train_arguments["use_cpu"] = True
    trainer = DecoderTrainer(
        budget=budget,
        model=model,
        args=make_training_arguments(train_arguments, out.with_name(f"{out.name}.checkpoints"), options.seed),
        train_dataset=dataset,
        data_collator=lambda batch: batch,
        callbacks=[StopWhenSpent(budget), ProgressReporter(log)],
    )
    trainer.remove_callback(PrinterCallback)
    logger.info("%.2fM parameters on %s.", sum(p.numel() for p in model.parameters()) / 1e6, trainer.args.device)
    trainer.train()

    model.half()
    model.config.use_cache = True  # the Trainer switched it off for training
    with write_directory_atomically(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    logger.info("Saved the decoder in %s.", out)

    asked = held_out_questions(options.questions)
    half_on_gpu = torch.bfloat16 if trainer.args.device.type == "cuda" else torch.float32
    answers = answer_from_texts(model.to(half_on_gpu).eval(), tokenizer, asked)
    results = score(asked, answers)
    with log.open("a", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps({"step": trainer.state.global_step, **asdict(result)}) + "\n")
    print(format_results(results))


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo.train_decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="decoder directory to write")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--seconds", type=float, help="training time; making the data comes on top")
    parser.add_argument("--scenes", type=int, default=600_000, help="conversations to make (default: 600000)")
    parser.add_argument("--batch-size", type=int, default=512, help="default: 512")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak (default: 1.5e-3)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a conversation (default: 256)")
    parser.add_argument("--hidden-size", type=int, default=256, help="default: 256")
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    parser.add_argument("--heads", type=int, default=4, help="default: 4")
    parser.add_argument("--questions", type=int, default=5000, help="held-out questions at the end (default: 5000)")
    workers = min(os.cpu_count() or 1, 16)  # a container may see more cores than it may use
    parser.add_argument("--workers", type=int, default=workers, help="processes that make data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: the accelerator if any")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--logging-steps", type=int, default=100, help="default: 100")
    parser.add_argument("--log", help="JSON lines file (default: OUT.metrics.jsonl)")
    options = parser.parse_args(arguments)
    configure_logging()
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
