"""Train the small language model that ships as the demo's decoder, from scratch on text about procedural scenes.

It reads a text that lists the objects of a scene and answers questions about it; later, stage two puts visual tokens in
the place of that text. Command: `python -m scripts.demo.train_decoder --out DIR --seconds 240`.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

from eval.scene_qa import AskedScene, answer_from_texts, format_results, held_out_questions, score
from scripts.demo.decoder_data import EncodedBatches, SceneConversations, load_batches
from scripts.demo.decoder_tokenizer import train_tokenizer
from scripts.demo.shared import Budget, refuse_used_directory
from sf_mllm.compiler import mend_compiler
from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.cores import count_cores
from sf_mllm.data.scenes.domains import DOMAINS
from sf_mllm.errors import CommandLineParser, InputError, report_input_errors
from sf_mllm.training.progress import configure_logging
from sf_mllm.training.run_folder import write_directory_atomically

logger = logging.getLogger("sf_mllm.demo")

_STARVED_SHARE = 0.1  # of the time without data from which on the data, not the device, is called the limit


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


class DecoderTraining:
    """A decoder that learns answers, on one device.

    Args:
        model: to train, on its device.
        learning_rate: peak.
        compiles: compile each layer and the loss; all layers share one compilation.
    """

    def __init__(self, model: LlamaForCausalLM, learning_rate: float, *, compiles: bool) -> None:
        self.model = model
        self.device = model.device
        self.peak = learning_rate
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.loss = _answer_loss
        if compiles:
            mend_compiler()
            # Layer by layer: the model around them then sees that there is no mask, and uses plain causal attention.
            for layer in model.model.layers:
                layer.compile(dynamic=False)
            self.loss = torch.compile(_answer_loss, dynamic=False)

    def learn(self, batch: dict[str, Tensor], factor: float) -> Tensor:
        """Take one step at a share of the peak rate; return the loss, which may not be computed yet.

        Args:
            batch: `input_ids` and `labels`, [B, L] each, on any device.
            factor: share of the peak rate; at 0 nothing changes, but everything gets compiled.
        """
        input_ids = batch["input_ids"].to(self.device, torch.int64, non_blocking=True)
        labels = batch["labels"].to(self.device, torch.int64, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
            loss = self.loss(hidden, self.model.lm_head.weight, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if factor:
            self.optimizer.step()
        return loss.detach()


def _answer_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the answers' tokens, from hidden states [B, L, D]."""
    logits = F.linear(hidden, head)[:, :-1].flatten(0, 1).float()  # [B * (L - 1), V]
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def train(options: argparse.Namespace) -> None:
    """Train, save and evaluate a decoder."""
    out = Path(options.out)
    refuse_used_directory(out)
    log = Path(options.log) if options.log else out.with_name(f"{out.name}.metrics.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    set_seed(options.seed)
    tokenizer = train_tokenizer(options.seed)
    batches = EncodedBatches(
        SceneConversations(options.seed, options.domain),
        tokenizer,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    model = build_decoder(tokenizer, hidden_size=options.hidden_size, layers=options.layers, heads=options.heads)
    compiles = device == "cuda" if options.compile is None else options.compile
    training = DecoderTraining(model.to(device).train(), options.learning_rate, compiles=compiles)
    asked = held_out_questions(options.questions, options.domain)
    logger.info("%.2fM parameters on %s.", sum(p.numel() for p in model.parameters()) / 1e6, device)

    waiting = iter(load_batches(batches, options.workers, pin_memory=device == "cuda"))
    training.learn(next(waiting), factor=0)  # compiles
    budget = Budget(options.steps, options.seconds)
    next_evaluation_s = options.evaluate_every_s
    began = time.monotonic()
    starved_s = evaluated_s = 0.0
    shown = (0, began)
    pending: torch.cuda.Event | None = None
    for step in count():
        if budget.spent(step) >= 1:
            break
        fetched = time.monotonic()
        batch = next(waiting)
        if pending is None or pending.query():  # the device had nothing left to do
            starved_s += time.monotonic() - fetched
        else:
            pending.synchronize()  # at most one step ahead, so that this question has an answer
        loss = training.learn(batch, budget.learning_rate_factor(step))
        if device == "cuda":
            pending = torch.cuda.Event()
            pending.record()
        if (step + 1) % options.logging_steps == 0:
            value, now = loss.item(), time.monotonic()
            if not math.isfinite(value):
                raise InputError(f"The loss is {value} at step {step + 1}; give a lower --learning-rate.")
            rate = (step + 1 - shown[0]) * options.batch_size / (now - shown[1])
            row = {"step": step + 1, "loss": value, "conversations_per_s": round(rate)}
            shown = (step + 1, now)
            _write(log, row)
            logger.info("step %d  loss %.4f  %.0f conversations/s", step + 1, value, rate)
        if time.monotonic() - began - evaluated_s >= next_evaluation_s:
            paused = time.monotonic()
            _report(model, tokenizer, asked[: options.samples], step + 1, log)
            budget.leave_out(time.monotonic() - paused)
            evaluated_s += time.monotonic() - paused
            shown = (shown[0], shown[1] + time.monotonic() - paused)
            next_evaluation_s += options.evaluate_every_s
    seconds = time.monotonic() - began - evaluated_s
    _tell_limit(step, seconds, starved_s, options)
    _write(log, {"step": step, "seconds": seconds, "waited_for_data_s": starved_s})

    del waiting  # ends its processes
    released = _copy(model, torch.float16)
    with write_directory_atomically(out) as temporary:
        released.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    logger.info("Saved the decoder in %s.", out)
    _report(released, tokenizer, asked, step, log)


def _copy(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """Copy a decoder without its compiled layers, which expect one shape only."""
    copied = LlamaForCausalLM(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.to(model.device, dtype).eval()


def _report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, asked: Sequence[AskedScene], step: int, log: Path
) -> None:
    """Print and write the accuracy per question type of a copy that answers in bf16, on a CPU in fp32."""
    answering = _copy(model, torch.bfloat16 if model.device.type == "cuda" else torch.float32)
    results = score(asked, answer_from_texts(answering, tokenizer, asked))
    for result in results:
        _write(log, {"step": step, **asdict(result)})
    print(f"After {step} steps:\n{format_results(results)}", flush=True)


def _tell_limit(steps: int, seconds: float, starved_s: float, options: argparse.Namespace) -> None:
    """Say how fast it was, and whether more processes or a faster device would help."""
    share = starved_s / max(seconds, 1e-9)
    limit = "the data: give more --workers" if share >= _STARVED_SHARE else "the device"
    logger.info(
        "%d steps in %.0f s, %.0f conversations/s; waiting for data took at most %.0f%% of it, so the limit is %s.",
        steps,
        seconds,
        steps * options.batch_size / max(seconds, 1e-9),
        100 * share,
        limit,
    )


def _write(log: Path, row: dict[str, object]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and train."""
    parser = CommandLineParser(prog="python -m scripts.demo.train_decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="decoder directory to write")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--seconds", type=float, help="training time; compiling and evaluating come on top")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="plain", help="of the scenes (default: plain)")
    parser.add_argument("--batch-size", type=int, default=512, help="conversations a step (default: 512)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak (default: 1.5e-3)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a conversation (default: 256)")
    parser.add_argument("--hidden-size", type=int, default=192, help="default: 192")
    parser.add_argument("--layers", type=int, default=8, help="default: 8")
    parser.add_argument("--heads", type=int, default=6, help="default: 6")
    parser.add_argument("--questions", type=int, default=5000, help="held-out questions at the end (default: 5000)")
    parser.add_argument("--evaluate-every-s", type=float, default=60, help="seconds between evaluations (default: 60)")
    parser.add_argument("--samples", type=int, default=1000, help="questions of those evaluations (default: 1000)")
    workers = min(count_cores(), 16)
    parser.add_argument("--workers", type=int, default=workers, help="processes that make data (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="default: the accelerator if any")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: compile on a GPU")
    parser.add_argument("--logging-steps", type=int, default=100, help="default: 100")
    parser.add_argument("--log", help="JSON lines file (default: OUT.metrics.jsonl)")
    options = parser.parse_args(arguments)
    if (options.steps if options.steps is not None else options.seconds) <= 0:
        raise InputError("There is nothing to train; give --steps or --seconds above zero.")
    if options.hidden_size % (2 * options.heads):
        raise InputError(
            f"{options.heads} heads cannot share a width of {options.hidden_size}; "
            "give a --hidden-size that is a multiple of twice the --heads."
        )
    if min(options.batch_size, options.questions, options.samples, options.logging_steps, options.layers) < 1:
        raise InputError("Batch size, layers, questions, samples and logging steps must be at least 1.")
    if options.workers < 0 or options.max_length < 128:
        raise InputError("--workers must be at least 0 and --max-length at least 128, the longest first turn.")
    configure_logging()
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
