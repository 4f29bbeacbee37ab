"""Train the small CLIP that ships as the demo's teacher, from scratch on procedural scenes.

What is to make it bind colours, shapes and places to objects instead of learning a bag of words: half of every batch
are twin scenes with one edit, every image has captions of several kinds at once (lists, relations, counts) with wrong
versions of each as negatives, it is compared with every phrase that names colour and shape of one object, texts that
happen to be true of another image are no negatives of it, an auxiliary loss tells what single patches show (its head is
thrown away), and scenes grow from one object to eight.
Command: `python -m scripts.demo.train_clip --out DIR --seconds 400 --device cuda`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.zero_shot import evaluate, evaluate_directory
from scripts.demo.clip_batch import BatchMaker
from scripts.demo.clip_model import (
    IMAGE_SIZE,
    build_model,
    build_tokenizer,
    create_directory,
    model_config,
    save_weights,
)
from scripts.demo.clip_step import (
    TeacherTask,
    contrastive_losses,
    patch_loss,
    phrase_loss,
    split_text,
)
from sf_mllm.compiler import mend_compiler
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scenes.domains import DOMAINS
from sf_mllm.data.scenes.tasks import build_tasks, task_set_of
from sf_mllm.errors import InputError, report_input_errors
from sf_mllm.training.bootstrap.zero_shot import ZeroShotResult, format_results

PHRASE_LOSS_WEIGHT = 3.0
PATCH_LOSS_WEIGHTS = (0.3, 0.03)  # at the start and at the end of the run
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP_STEPS = 300
LOG_EVERY_STEPS = 50


def build_optimizer(task: TeacherTask, device: str) -> torch.optim.AdamW:
    """Return AdamW; weight decay acts on matrices only, not on norms, biases, positions and embeddings."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in task.named_parameters():
        is_matrix = parameter.dim() >= 2 and "embedding" not in name
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=device.startswith("cuda"))


class Clock:
    """Training time in seconds; stands still while paused, so compiling and evaluating cost no learning."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._elapsed = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin or go on."""
        self._wait_for_device()
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stand still until the next start."""
        self._elapsed, self._started = self.seconds(), None

    def seconds(self) -> float:
        """Return the time spent running."""
        if self._started is None:
            return self._elapsed
        return self._elapsed + time.perf_counter() - self._started

    def _wait_for_device(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()


def train(options: argparse.Namespace) -> list[ZeroShotResult]:
    """Train, save after each evaluation, and return the scores of the saved model."""
    device, out = options.device, Path(options.out)
    domain, task_set = options.domain, task_set_of(options.domain)
    config = model_config(options.width, options.layers, options.text_layers, options.embed_dim, domain)
    create_directory(out, config)
    log_path = Path(options.log or f"{out}.jsonl")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_text("", encoding="utf-8")  # the directory is new, so a log of that name is an older run's
    torch.set_float32_matmul_precision("high")
    clip = build_model(config, options.seed)
    task = TeacherTask(clip, domain).to(device)
    if options.compile:
        mend_compiler()
    # Every step has the same shapes, so each is compiled once.
    forward = torch.compile(task, dynamic=False) if options.compile else task
    batches = BatchMaker(options.batch_size, options.seed, device, domain=domain, compiles=options.compile)
    optimizer = build_optimizer(task, device)
    tasks = build_tasks(options.samples, task_set=task_set)
    hf_tokenizer = build_tokenizer(DOMAINS[domain].context_length)

    def tokenizer(texts: list[str]) -> Tensor:
        return hf_tokenizer(
            texts,
            return_tensors="pt",
            padding="max_length",
            max_length=DOMAINS[domain].context_length,
            truncation=True,
        ).input_ids

    def write(**row: object) -> None:
        with log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def checkpoint(step: int) -> None:
        task.eval()
        results = evaluate(
            tasks,
            clip.encode_image,
            clip.encode_text,
            tokenizer,
            image_size=IMAGE_SIZE,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            device=device,
        )
        task.train()
        save_weights(clip, out)
        print(f"[{step} steps, {clock.seconds():.0f} s] {format_results(results)}", flush=True)
        write(step=step, seconds=clock.seconds(), zero_shot={item.task: item.accuracy for item in results})

    clock = Clock(device)
    wall_start = time.perf_counter()
    next_evaluation_s = options.evaluate_every_s
    last_log = (0, 0.0)
    task.train()
    step, progress = 0, 0.0
    while progress < 1:
        learning_rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        batch = batches.make(step, progress)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            image, text, phrases, patches = forward(batch.pixels, batch.lists, batch.short, batch.phrases)
        scale = clip.logit_scale.exp()
        by_group = [
            contrastive_losses(image, features, scale, group)
            for features, group in zip(split_text(text, batch), batch.groups, strict=True)
        ]
        parts = (
            *torch.stack(by_group).mean(dim=0),
            phrase_loss(image, phrases, scale, batch.phrases_hold, batch.phrase_counts),
            patch_loss(patches, batch.scenes, batch.owners),
        )
        patch_weight = PATCH_LOSS_WEIGHTS[0] + progress * (PATCH_LOSS_WEIGHTS[1] - PATCH_LOSS_WEIGHTS[0])
        *contrasts, phrases_loss, patches_loss = parts
        loss = sum(contrasts) + PHRASE_LOSS_WEIGHT * phrases_loss + patch_weight * patches_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))

        step += 1
        if step == 1:  # the first step compiles
            clock.start()
            print(f"first step after {time.perf_counter() - wall_start:.0f} s", flush=True)
        if step % LOG_EVERY_STEPS == 0:
            values = torch.stack((loss.detach(), *(part.detach() for part in parts), clip.logit_scale.exp())).tolist()
            if not math.isfinite(values[0]):
                raise RuntimeError(f"The loss is {values[0]} at step {step}.")
            rate = (step - last_log[0]) * options.batch_size / max(clock.seconds() - last_log[1], 1e-9)
            last_log = (step, clock.seconds())
            names = ("loss", "info_nce", "wrong_text", "twin", "phrase", "patch", "logit_scale")
            row = dict(zip(names, (round(value, 4) for value in values), strict=True))
            write(step=step, seconds=clock.seconds(), images_per_s=round(rate), lr=learning_rate, **row)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{step:6d} {clock.seconds():6.0f} s {rate:7.0f} images/s  {shown}", flush=True)
        if clock.seconds() >= next_evaluation_s:
            clock.pause()
            checkpoint(step)
            next_evaluation_s = clock.seconds() + options.evaluate_every_s
            clock.start()
        progress = step / options.steps if options.steps else clock.seconds() / options.seconds

    clock.pause()
    save_weights(clip, out)
    results = evaluate_directory(out, tasks=task_set, samples=2 * options.samples, device=device)
    print(f"[saved model, {step} steps, {clock.seconds():.0f} s] {format_results(results)}", flush=True)
    write(
        step=step,
        seconds=clock.seconds(),
        wall_seconds=time.perf_counter() - wall_start,
        images=step * options.batch_size,
        final=[asdict(item) for item in results],
    )
    return results


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo.train_clip", description="Train the demo's CLIP.")
    parser.add_argument("--out", required=True, help="new directory for the model")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, default=400, help="training time, compiling not counted (default: 400)"
    )
    length.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="plain", help="of the scenes (default: plain)")
    parser.add_argument("--batch-size", type=int, default=512, help="images a step, twins included (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--log", help="JSON lines file (default: OUT.jsonl)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: compile")
    parser.add_argument("--evaluate-every-s", type=float, default=60, help="seconds between evaluations (default: 60)")
    parser.add_argument("--samples", type=int, default=512, help="per zero-shot task; twice that at the end")
    parser.add_argument("--width", type=int, default=256, help="of both towers, a multiple of 64 (default: 256)")
    parser.add_argument("--layers", type=int, default=6, help="of the image tower (default: 6)")
    parser.add_argument("--text-layers", type=int, default=2, help="default: 2")
    parser.add_argument("--embed-dim", type=int, default=512, help="default: 512")
    options = parser.parse_args(arguments)
    if options.batch_size < 4 or options.batch_size % 2:
        raise InputError(f"Batch size {options.batch_size} is not possible; give an even number of at least 4.")
    if options.width % 64 or options.width < 64:
        raise InputError(f"Width {options.width} is not possible; give a multiple of 64.")
    if (options.steps if options.steps is not None else options.seconds) <= 0:
        raise InputError("There is nothing to train; give --seconds or --steps above zero.")
    if options.seed < 0 or options.seed > 1_000_000_000:
        raise InputError(f"Seed {options.seed} is out of range; give a number from 0 to 1000000000.")
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
