"""Train a timm ViT to name the digit in a picture: a small stand-in for teachers that classify, such as AugReg's.

Pictures are drawn on the device, each once. So that a ViT from scratch learns within minutes, its positions start as
sines and cosines, and an auxiliary loss tells which digit single patches show; its head is thrown away. The directory
that is written is timm's own, `timm.create_model("local-dir:DIR", pretrained=True)` loads it, and so does a bootstrap
run with `teacher.source=timm teacher.model=local-dir:DIR`.
Command: `python -m scripts.demo.train_classifier --out DIR --seconds 90 --device cuda`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer, save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from scripts.demo.digits import BACKGROUND, DIGITS, HELD_OUT_SEED, DigitPictures, draw_digits
from scripts.demo.shared import Budget, refuse_used_directory
from sf_mllm.errors import CommandLineParser, InputError, first_line, nearest, report_input_errors
from sf_mllm.training.run_folder import write_directory_atomically

PATCH_LOSS_WEIGHT = 1.0
BACKGROUND_WEIGHT = 0.1  # of a patch without a digit, since most have none
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
WARM_UP_SHARE = 0.05
LOG_EVERY_STEPS = 50


class DigitTask(nn.Module):
    """A ViT that names a picture's digit, with a linear head that names the one that each patch shows."""

    mean: Tensor
    std: Tensor
    patch_weights: Tensor

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.patch_head = nn.Linear(vit.embed_dim, BACKGROUND + 1)
        settings = resolve_model_data_config(vit)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name])[:, None, None] * 255, persistent=False)
        weights = torch.ones(BACKGROUND + 1)
        weights[BACKGROUND] = BACKGROUND_WEIGHT
        self.register_buffer("patch_weights", weights, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Name what pictures show.

        Args:
            pixels: [B, 3, S, S] uint8.

        Returns:
            Logits of the pictures, [B, 10], and of their patches, [B, patches, 11].
        """
        tokens = self.vit.forward_features((pixels.float() - self.mean) / self.std)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return self.vit.forward_head(tokens).float(), self.patch_head(patches).float()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers leave undecayed."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def losses(self, logits: Tensor, patch_logits: Tensor, pictures: DigitPictures) -> Tensor:
        """Return two values: cross entropy of the pictures, smoothed, and of their patches."""
        patch_labels = pictures.patch_labels(*self.vit.patch_embed.grid_size)
        return torch.stack(
            (
                F.cross_entropy(logits, pictures.labels, label_smoothing=LABEL_SMOOTHING),
                F.cross_entropy(patch_logits.flatten(0, 1), patch_labels.flatten(), weight=self.patch_weights),
            )
        )


def build_vit(model: str, *, pretrained: bool, seed: int) -> VisionTransformer:
    """Build a timm ViT with a head for the ten digits.

    Raises:
        InputError: timm has no such model, it is no plain ViT, or its weights cannot be had.
    """
    torch.manual_seed(seed)
    try:
        vit = timm.create_model(
            model,
            pretrained=pretrained,
            num_classes=len(DIGITS),
            pretrained_cfg_overlay={"tag": "digits"},  # the saved file shall not name weights of timm's
        )
    except Exception as error:  # timm, its file readers and the hub raise almost any type here
        hint = nearest(model, timm.list_models())
        raise InputError(f"timm cannot make the model '{model}': {first_line(error)}.{hint}") from error
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        raise InputError(
            f"timm's '{model}' is no VisionTransformer with positions; choose one, as vit_base_patch16_224."
        )
    if not pretrained:
        vit.init_weights("jax")  # as AugReg's models began
        patches = vit.patch_embed.num_patches
        with torch.no_grad():
            vit.pos_embed[0, -patches:] = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)
    return vit


@torch.no_grad()
def evaluate(classify: Callable[[Tensor], Tensor], samples: int, image_size: int, device: str) -> float:
    """Return the accuracy on held-out pictures.

    Args:
        classify: pixels -> logits [B, 10].
        samples: number of pictures.
        image_size: side in pixels.
        device: to work on.
    """
    right = 0
    for indices in torch.arange(samples, device=device).split(256):
        pictures = draw_digits(indices, HELD_OUT_SEED, image_size)
        right += int((classify(pictures.pixels).argmax(dim=-1) == pictures.labels).sum())
    return right / samples


def train(options: argparse.Namespace) -> None:
    """Train, evaluate and save a classifier."""
    device, out = options.device, Path(options.out)
    refuse_used_directory(out)
    wall_start = time.monotonic()
    torch.set_float32_matmul_precision("high")
    vit = build_vit(options.model, pretrained=options.pretrained, seed=options.seed)
    image_size = vit.patch_embed.img_size[0]
    log_path = Path(options.log or f"{out}.jsonl")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log_path.write_text("", encoding="utf-8")  # the directory is new, so a log of that name is an older run's

    def write(**row: object) -> None:
        with log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    task = DigitTask(vit).to(device)
    optimizer = create_optimizer_v2(task, "adamw", lr=options.learning_rate, weight_decay=WEIGHT_DECAY)
    forward = torch.compile(task, dynamic=False) if options.compile else task  # all steps have the same shapes
    indices = torch.arange(options.batch_size, device=device)
    precision = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda"))

    def learn(step: int) -> tuple[Tensor, Tensor]:
        """Return losses and accuracy of a step's pictures, with gradients in place."""
        pictures = draw_digits(indices + step * options.batch_size, options.seed, image_size)
        with precision:
            logits, patch_logits = forward(pictures.pixels)
        losses = task.losses(logits, patch_logits, pictures)
        (losses[0] + PATCH_LOSS_WEIGHT * losses[1]).backward()
        return losses.detach(), (logits.argmax(dim=-1) == pictures.labels).float().mean()

    task.train()
    learn(0)  # compiles, before the time counts
    optimizer.zero_grad(set_to_none=True)
    print(f"first pass after {time.monotonic() - wall_start:.0f} s", flush=True)
    budget = Budget(options.steps, options.seconds, warm_up_share=WARM_UP_SHARE)
    start = last_log = time.monotonic()
    step = 0
    while budget.spent(step) < 1:
        learning_rate = options.learning_rate * budget.learning_rate_factor(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        losses, right = learn(step)
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % LOG_EVERY_STEPS == 0:
            loss, patch_loss, share_right = torch.cat((losses, right[None])).tolist()
            if not math.isfinite(loss + patch_loss):
                raise RuntimeError(f"The losses are {loss} and {patch_loss} at step {step}.")
            now = time.monotonic()
            rate, last_log = LOG_EVERY_STEPS * options.batch_size / (now - last_log), now
            row = {"loss": round(loss, 4), "patch_loss": round(patch_loss, 4), "accuracy": round(share_right, 4)}
            write(step=step, seconds=now - start, images_per_s=round(rate), lr=learning_rate, **row)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{step:6d} {now - start:6.0f} s {rate:7.0f} images/s  {shown}", flush=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.monotonic() - start

    vit.eval()

    def classify(pixels: Tensor) -> Tensor:
        with precision:
            return task(pixels)[0]

    accuracy = evaluate(classify, options.samples, image_size, device)
    with write_directory_atomically(out) as temporary:
        save_for_hf(vit, str(temporary), {"label_names": list(DIGITS)}, safe_serialization=True)
    print(f"[{step} steps, {seconds:.0f} s] held-out accuracy {100 * accuracy:.2f} %", flush=True)
    write(
        step=step,
        seconds=seconds,
        wall_seconds=time.monotonic() - wall_start,
        images=step * options.batch_size,
        samples=options.samples,
        held_out_accuracy=accuracy,
    )


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m scripts.demo.train_classifier", description="Train a timm ViT to name drawn digits."
    )
    parser.add_argument("--out", required=True, help="new directory for the model")
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm's name (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights for that name")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=90, help="training time, compiling not counted (default: 90)")
    length.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument("--batch-size", type=int, default=256, help="pictures a step (default: 256)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak (default: 3e-4)")
    parser.add_argument("--samples", type=int, default=4096, help="held-out pictures at the end (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    parser.add_argument("--log", help="JSON lines file (default: OUT.jsonl)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="default: compile")
    options = parser.parse_args(arguments)
    if (options.steps if options.steps is not None else options.seconds) <= 0:
        raise InputError("There is nothing to train; give --seconds or --steps above zero.")
    if options.batch_size < 1 or options.samples < 1:
        raise InputError(f"--batch-size {options.batch_size} and --samples {options.samples} must both be at least 1.")
    if not 0 <= options.seed < HELD_OUT_SEED:
        raise InputError(f"Seed {options.seed} is out of range; give a number from 0 to {HELD_OUT_SEED - 1}.")
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
