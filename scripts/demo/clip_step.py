"""One step of the demo teacher's training: the batch, the model with its patch head, the losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import CLIP
from torch import Tensor, nn

from scripts.demo.scene_supervision import make_twins, patch_owners
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scene_captions import full_captions, may_hold, mixed_captions, tokenize, wrong_captions
from sf_mllm.data.scene_render import render
from sf_mllm.data.scene_sampling import COLORS, SHAPES, SIZES, Draws, Scenes, ScenesConfig, concatenate, sample_scenes

IMAGE_SIZE = 224
WRONG_TEXTS = 3  # wrong versions of each caption
PHASES = ((0.05, 1), (0.13, 2), (1.0, 8))  # (until this share of the run, most objects); mixed captions in the last
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

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip
        self.patch_head = nn.Linear(clip.visual.proj.shape[0], sum(_PATCH_CLASSES))
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
