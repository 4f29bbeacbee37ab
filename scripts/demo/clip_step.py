"""One step of the demo teacher's training: the batch, the model with its patch head, the losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from scripts.demo.scene_supervision import make_twins, patch_owners
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scene_captions import (
    SHORT_LENGTH,
    Captions,
    count_captions,
    list_captions,
    may_hold,
    phrase_captions,
    relation_captions,
    tokenize,
    wrong_captions,
)
from sf_mllm.data.scene_render import render
from sf_mllm.data.scene_sampling import COLORS, SHAPES, SIZES, Draws, Scenes, ScenesConfig, concatenate, sample_scenes

IMAGE_SIZE = 224
WRONG_TEXTS = 3  # wrong versions of each caption
PHASES = ((0.04, 1), (0.1, 2), (0.2, 4), (1.0, 8))  # (until this share of the run, most objects)
_CAPTION_KINDS: tuple[Callable[[Scenes, Draws], Captions], ...] = (
    list_captions,
    phrase_captions,
    relation_captions,
    count_captions,
)  # lists first: the others are short and encoded together
_PATCH_CLASSES = (len(COLORS), len(SHAPES), len(SIZES), 1)  # the last: does the patch show an object
_TWIN_SEED_OFFSET, _CAPTION_SEED_OFFSET, _WRONG_SEED_OFFSET = 1_000_000_007, 2_000_000_011, 3_000_000_019


@dataclass
class CaptionGroup:
    """Captions of one kind, one of each image, and what is known of their truth."""

    tokens: Tensor  # [(1 + WRONG_TEXTS) * B, T], true captions first
    holds: Tensor  # [B, B] bool, caption t may be true of scene b
    wrong_holds: Tensor  # [B, WRONG_TEXTS] bool, a wrong caption may be true after all


@dataclass
class Batch:
    """One training batch: originals in the first half, their twins in the second."""

    scenes: Scenes
    pixels: Tensor  # [B, 3, H, W] uint8
    groups: list[CaptionGroup]  # as _CAPTION_KINDS

    @property
    def lists(self) -> Tensor:
        """Tokens of the lists: [(1 + WRONG_TEXTS) * B, CONTEXT_LENGTH]."""
        return self.groups[0].tokens

    @property
    def short(self) -> Tensor:
        """Tokens of all other captions: [3 * (1 + WRONG_TEXTS) * B, SHORT_LENGTH]."""
        return torch.cat([group.tokens[:, :SHORT_LENGTH] for group in self.groups[1:]])


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

    def forward(self, pixels: Tensor, lists: Tensor, short: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a batch.

        Args:
            pixels: [B, 3, H, W] uint8.
            lists: tokens [L, CONTEXT_LENGTH].
            short: tokens [S, SHORT_LENGTH].

        Returns:
            Unit image features [B, E], unit text features [L + S, E] and patch logits [B, patches, classes].
        """
        outputs = self.clip.visual.forward_intermediates(
            (pixels.float() - self.mean) / self.std, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        image_features = F.normalize(outputs["image_features"].float(), dim=-1)
        text_features = torch.cat([self.encode_text(lists), self.encode_text(short)])
        return image_features, text_features, self.patch_head(outputs["image_intermediates"][0]).float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return unit features [L, E] of tokens [L, T], T up to the context: `CLIP.encode_text` takes full length only.

        The text tower is causal and reads out at <eos>, so padding behind it changes nothing.
        """
        clip, length = self.clip, tokens.shape[1]
        features = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        features = clip.ln_final(clip.transformer(features, attn_mask=clip.attn_mask[:length, :length]))
        pooled = text_global_pool(features, tokens, clip.text_pool_type, eos_token_id=clip.text_eos_id)
        return F.normalize((pooled @ clip.text_projection).float(), dim=-1)


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
    wrong_indices = torch.cat([WRONG_TEXTS * indices + number for number in range(WRONG_TEXTS)])
    wrong_draws = Draws(seed + _WRONG_SEED_OFFSET, wrong_indices)
    groups = [make_group(scenes, kind(scenes, draws), wrong_draws) for kind in _CAPTION_KINDS]
    return Batch(scenes=scenes, pixels=draw(scenes, IMAGE_SIZE), groups=groups)


def make_group(scenes: Scenes, captions: Captions, wrong_draws: Draws) -> CaptionGroup:
    """Add wrong versions to one caption of each scene, and find out what is true of what."""
    wrong = wrong_captions(concatenate([captions] * WRONG_TEXTS), wrong_draws)
    return CaptionGroup(
        tokens=tokenize(concatenate((captions, wrong))),
        holds=may_hold(captions, scenes, all_pairs=True),
        wrong_holds=may_hold(wrong, concatenate([scenes] * WRONG_TEXTS)).view(WRONG_TEXTS, -1).T,
    )


def split_text(text: Tensor, batch: Batch) -> list[Tensor]:
    """Cut the text features [L + S, E] of `TeacherTask.forward` into those of each group."""
    return list(text.split([len(group.tokens) for group in batch.groups]))


def contrastive_losses(image: Tensor, text: Tensor, scale: Tensor, group: CaptionGroup) -> Tensor:
    """Compare images with texts of one kind; a text that may be true of an image is never its negative.

    Args:
        image: [B, E] unit features.
        text: [(1 + WRONG_TEXTS) * B, E] unit features, true captions first.
        scale: factor of the cosine similarities.
        group: what the text features belong to.

    Returns:
        [3]: InfoNCE over the batch, cross entropy of each caption against its wrong versions, and the two-way loss
        between an original and its twin (both ways round); each a mean.
    """
    size, half = len(image), len(image) // 2
    true_text, wrong_text = text[:size], text[size:].view(WRONG_TEXTS, size, -1)
    logits = scale * true_text @ image.T  # [texts, images]
    own = torch.eye(size, dtype=torch.bool, device=image.device)
    masked = logits.masked_fill(group.holds & ~own, -math.inf)
    labels = torch.arange(size, device=image.device)
    info_nce = (F.cross_entropy(masked, labels) + F.cross_entropy(masked.T, labels)) / 2

    wrong_logits = scale * (wrong_text * image).sum(dim=-1).T  # [B, WRONG_TEXTS]
    wrong_logits = wrong_logits.masked_fill(group.wrong_holds, -math.inf)
    own_logits = logits.diagonal()
    first = torch.zeros_like(labels)
    wrong_loss = F.cross_entropy(torch.cat((own_logits[:, None], wrong_logits), dim=1), first)

    other = labels.roll(half)  # the twin of each original and the original of each twin
    by_text = torch.stack((own_logits, masked[labels, other]), dim=1)  # own image against the twin's
    by_image = torch.stack((own_logits, masked[other, labels]), dim=1)  # own text against the twin's
    twin_loss = (F.cross_entropy(by_text, first) + F.cross_entropy(by_image, first)) / 2
    return torch.stack((info_nce, wrong_loss, twin_loss))


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
