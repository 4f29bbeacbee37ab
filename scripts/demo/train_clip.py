"""Train the small CLIP that ships as the demo's teacher, from scratch on procedural scenes.

What makes it bind colours, shapes and places to objects instead of learning a bag of words: half of every batch are
twin scenes with one edit, every caption has wrong versions of itself as negatives, texts that happen to be true of
another image are masked, an auxiliary loss tells what single patches show (its head is thrown away), and scenes grow
from one object over two to eight. Command: `python -m scripts.demo.train_clip --out DIR --seconds 400 --device cuda`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.zero_shot import ZeroShotResult, build_tasks, evaluate, evaluate_directory, format_results
from scripts.demo.clip_model import build_model, build_tokenizer, create_directory, model_config, save_weights
from scripts.demo.scene_supervision import make_twins, patch_owners
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scene_captions import (
    CONTEXT_LENGTH,
    full_captions,
    may_hold,
    mixed_captions,
    tokenize,
    wrong_captions,
)
from sf_mllm.data.scene_render import render
from sf_mllm.data.scene_sampling import COLORS, SHAPES, SIZES, Draws, Scenes, ScenesConfig, concatenate, sample_scenes
from sf_mllm.errors import InputError, report_input_errors

IMAGE_SIZE = 224
WRONG_TEXTS = 3  # wrong versions of each caption
PHASES = ((0.05, 1), (0.13, 2), (1.0, 8))  # (until this share of the run, most objects); mixed captions in the last
PATCH_LOSS_WEIGHTS = (0.3, 0.03)  # at the start and at the end of the run
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP_STEPS = 300
LOG_EVERY_STEPS = 50
_PATCH_CLASSES = (len(COLORS), len(SHAPES), len(SIZES), 1)  # the last: does the patch show an object
_TWIN_SEED_OFFSET, _CAPTION_SEED_OFFSET, _WRONG_SEED_OFFSET = 1_000_000_007, 2_000_000_011, 3_000_000_019


@dataclass
class Batch:
    """One training batch: originals in the first half, their twins in the second."""

    scenes: Scenes
    pixels: Tensor  # [B, 3, H, W] uint8
    tokens: Tensor  # [(1 + WRONG_TEXTS) * B, T], true captions first
    holds: Tensor  # [B, B] bool, caption t may be true of scene b
    wrong_holds: Tensor  # [B, WRONG_TEXTS] bool, a wrong caption may be true after all


class TeacherTask(nn.Module):
    """The CLIP with a linear head that says what each patch shows."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.patch_head = nn.Linear(clip.visual.ln_post.normalized_shape[0], sum(_PATCH_CLASSES))
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None] * 255, persistent=False)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit image features [B, E], unit text features [T, E] and patch logits [B, patches, classes]."""
        outputs = self.clip.visual.forward_intermediates(
            (pixels.float() - self.mean) / self.std, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        image_features = F.normalize(outputs["image_features"].float(), dim=-1)
        text_features = F.normalize(self.clip.encode_text(tokens).float(), dim=-1)
        return image_features, text_features, self.patch_head(outputs["image_intermediates"][0]).float()


def make_batch(
    step: int, batch_size: int, seed: int, progress: float, device: str, draw: Callable[[Scenes, int], Tensor] = render
) -> Batch:
    """Make scenes, twins, captions and wrong captions; the same arguments give the same batch.

    Args:
        step: number of the batch.
        batch_size: originals and twins together.
        seed: of the run.
        progress: 0..1, decides the phase of the curriculum.
        device: to work on.
        draw: `render`, possibly compiled.
    """
    max_objects = next(objects for until, objects in PHASES if progress <= until)
    half = batch_size // 2
    indices = torch.arange(step * half, (step + 1) * half, device=device)
    originals = sample_scenes(indices, ScenesConfig(seed=seed, max_objects=max_objects))
    scenes = concatenate((originals, make_twins(originals, Draws(seed + _TWIN_SEED_OFFSET, indices))))

    indices = torch.cat((indices, indices))  # twins get captions, and wrong captions, of the same structure
    draws = Draws(seed + _CAPTION_SEED_OFFSET, indices)
    if max_objects == PHASES[-1][1]:
        captions = mixed_captions(scenes, draws)
    else:
        captions = full_captions(scenes, draws.uniform(1)[:, 0] < 0.5)
    wrong_indices = torch.cat([WRONG_TEXTS * indices + number for number in range(WRONG_TEXTS)])
    wrong = wrong_captions(concatenate([captions] * WRONG_TEXTS), Draws(seed + _WRONG_SEED_OFFSET, wrong_indices))
    return Batch(
        scenes=scenes,
        pixels=draw(scenes, IMAGE_SIZE),
        tokens=tokenize(concatenate((captions, wrong))),
        holds=may_hold(captions, scenes, all_pairs=True),
        wrong_holds=may_hold(wrong, concatenate([scenes] * WRONG_TEXTS)).view(WRONG_TEXTS, -1).T,
    )


def contrastive_losses(image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Compare images with texts; a text that may be true of an image is never its negative.

    Args:
        image: [B, E] unit features.
        text: [(1 + WRONG_TEXTS) * B, E] unit features, true captions first.
        scale: factor of the cosine similarities.
        batch: what the features belong to.

    Returns:
        InfoNCE over the batch, cross entropy of each caption against its wrong versions, and the two-way loss between
        an original and its twin (both ways round); each a mean.
    """
    size, half = len(image), len(image) // 2
    true_text, wrong_text = text[:size], text[size:].view(WRONG_TEXTS, size, -1)
    logits = scale * true_text @ image.T  # [texts, images]
    own = torch.eye(size, dtype=torch.bool, device=image.device)
    masked = logits.masked_fill(batch.holds & ~own, -math.inf)
    labels = torch.arange(size, device=image.device)
    info_nce = (F.cross_entropy(masked, labels) + F.cross_entropy(masked.T, labels)) / 2

    wrong_logits = scale * (wrong_text * image).sum(dim=-1).T  # [B, WRONG_TEXTS]
    wrong_logits = wrong_logits.masked_fill(batch.wrong_holds, -math.inf)
    own_logits = logits.diagonal()
    first = torch.zeros_like(labels)
    wrong_loss = F.cross_entropy(torch.cat((own_logits[:, None], wrong_logits), dim=1), first)

    other = labels.roll(half)  # the twin of each original and the original of each twin
    by_text = torch.stack((own_logits, masked[labels, other]), dim=1)  # own image against the twin's
    by_image = torch.stack((own_logits, masked[other, labels]), dim=1)  # own text against the twin's
    twin_loss = (F.cross_entropy(by_text, first) + F.cross_entropy(by_image, first)) / 2
    return info_nce, wrong_loss, twin_loss


def patch_loss(logits: Tensor, scenes: Scenes) -> Tensor:
    """Classify colour, shape and size of the object that each patch shows, and whether it shows one.

    Args:
        logits: [B, patches, colours + shapes + sizes + 1].
        scenes: B scenes.
    """
    owner = patch_owners(scenes, math.isqrt(logits.shape[1]))  # [B, patches]
    is_object = owner >= 0
    *attribute_logits, object_logit = logits.split(_PATCH_CLASSES, dim=-1)
    loss = F.binary_cross_entropy_with_logits(object_logit[..., 0], is_object.float())
    for values, prediction in zip((scenes.color, scenes.shape, scenes.size), attribute_logits, strict=True):
        target = values.gather(1, owner.clamp(min=0)).masked_fill(~is_object, -100)
        loss = loss + F.cross_entropy(prediction.flatten(0, 1), target.flatten())
    return loss


def build_optimizer(task: TeacherTask, device: str) -> torch.optim.AdamW:
    """Return AdamW; weight decay acts on matrices only, not on norms, biases, positions and embeddings."""
    decayed, plain = [], []
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
    config = model_config(options.width, options.layers, options.text_layers, options.embed_dim)
    create_directory(out, config)
    log_path = Path(options.log or f"{out}.jsonl")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_text("", encoding="utf-8")  # the directory is new, so a log of that name is an older run's
    torch.set_float32_matmul_precision("high")
    clip = build_model(config, options.seed)
    task = TeacherTask(clip).to(device)
    # Every step has the same shapes, so each is compiled once.
    forward = torch.compile(task, dynamic=False) if options.compile else task
    draw = torch.compile(render, dynamic=False) if options.compile else render
    optimizer = build_optimizer(task, device)
    tasks = build_tasks(options.samples)
    hf_tokenizer = build_tokenizer()

    def tokenizer(texts: list[str]) -> Tensor:
        return hf_tokenizer(
            texts, return_tensors="pt", padding="max_length", max_length=CONTEXT_LENGTH, truncation=True
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
        batch = make_batch(step, options.batch_size, options.seed, progress, device, draw)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            image, text, patches = forward(batch.pixels, batch.tokens)
        parts = (
            *contrastive_losses(image, text, clip.logit_scale.exp(), batch),
            patch_loss(patches, batch.scenes),
        )
        patch_weight = PATCH_LOSS_WEIGHTS[0] + progress * (PATCH_LOSS_WEIGHTS[1] - PATCH_LOSS_WEIGHTS[0])
        loss = parts[0] + parts[1] + parts[2] + patch_weight * parts[3]
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
            names = ("loss", "info_nce", "wrong_text", "twin", "patch", "logit_scale")
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
    results = evaluate_directory(out, samples=2 * options.samples, device=device)
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
    parser.add_argument("--batch-size", type=int, default=512, help="images a step, twins included (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--log", help="JSON lines file (default: OUT.jsonl)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: compile")
    parser.add_argument("--evaluate-every-s", type=float, default=60, help="seconds between evaluations (default: 60)")
    parser.add_argument("--samples", type=int, default=512, help="per zero-shot task; twice that at the end")
    parser.add_argument("--width", type=int, default=192, help="of both towers, a multiple of 64 (default: 192)")
    parser.add_argument("--layers", type=int, default=12, help="of the image tower (default: 12)")
    parser.add_argument("--text-layers", type=int, default=3, help="default: 3")
    parser.add_argument("--embed-dim", type=int, default=256, help="default: 256")
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
