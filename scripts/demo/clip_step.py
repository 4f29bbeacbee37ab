"""One step of the demo teacher's training: the model with its patch head, the losses."""

import math

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from scripts.demo.clip_batch import WRONG_TEXTS, Batch, CaptionGroup
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.data.scenes.domains import DOMAINS
from sf_mllm.data.scenes.sampling import Scenes

_PATCH_ATTRIBUTES = ("color", "shape", "size", "texture")


def patch_classes(domain: str) -> dict[str, int]:
    """Return how many classes the patch head has for each attribute; "object" tells whether a patch shows one."""
    attributes = DOMAINS[domain].attributes
    return {name: len(attributes[name]) for name in _PATCH_ATTRIBUTES if name in attributes} | {"object": 1}


class TeacherTask(nn.Module):
    """The CLIP with a linear head that says what each patch shows."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIP, domain: str = "plain") -> None:
        super().__init__()
        self.clip = clip
        self.patch_head = nn.Linear(clip.visual.proj.shape[0], sum(patch_classes(domain).values()))
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None] * 255, persistent=False)

    def forward(
        self, pixels: Tensor, lists: Tensor, short: Tensor, phrases: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode a batch.

        Args:
            pixels: [B, 3, H, W] uint8.
            lists: tokens [L, context length of the domain].
            short: tokens [S, its short length].
            phrases: tokens [P, its phrase length].

        Returns:
            Unit features of images [B, E], lists and short texts [L + S, E] and phrases [P, E], and patch logits
            [B, patches, classes].
        """
        outputs = self.clip.visual.forward_intermediates(
            (pixels.float() - self.mean) / self.std, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        image_features = F.normalize(outputs["image_features"].float(), dim=-1)
        text_features = torch.cat([self.encode_text(lists), self.encode_text(short)])
        patches = outputs["image_intermediates"][0]
        return (
            image_features,
            text_features,
            self.encode_text(phrases),
            self.patch_head(patches).float(),
        )

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return unit features [L, E] of tokens [L, T], T up to the context: `CLIP.encode_text` takes full length only.

        The text tower is causal and reads out at <eos>, so padding behind it changes nothing.
        """
        clip, length = self.clip, tokens.shape[1]
        features = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        features = clip.ln_final(clip.transformer(features, attn_mask=clip.attn_mask[:length, :length]))
        pooled = text_global_pool(features, tokens, clip.text_pool_type, eos_token_id=clip.text_eos_id)
        return F.normalize((pooled @ clip.text_projection).float(), dim=-1)


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


def phrase_loss(image: Tensor, phrases: Tensor, scale: Tensor, holds: Tensor, counts: list[int]) -> Tensor:
    """Cross entropy of every true phrase about an image against all false ones that state the same attributes.

    All near misses are among them: the right shape in the wrong place, the right place with the wrong colour. Phrases
    that state other attributes are left out: no order between "red object" and "small blue star top" is asked for.

    Args:
        image: [B, E] unit features.
        phrases: [P, E] unit features.
        scale: factor of the cosine similarities.
        holds: [P, B] bool.
        counts: how many phrases in a row state the same attributes; sums to P.

    Returns:
        Mean over images and sets of attributes.
    """
    losses = []
    logits = (scale * image @ phrases.T).split(counts, dim=1)
    for values, is_true in zip(logits, holds.T.split(counts, dim=1), strict=True):
        # Not -inf, whose gradient is undefined where all phrases are true.
        false_mass = values.masked_fill(is_true, -1e4).logsumexp(dim=1, keepdim=True)
        loss = F.softplus(false_mass - values).masked_fill(~is_true, 0)
        losses.append((loss.sum(dim=1) / is_true.sum(dim=1).clamp(min=1)).mean())
    return torch.stack(losses).mean()


def patch_loss(logits: Tensor, scenes: Scenes, owner: Tensor) -> Tensor:
    """Classify the attributes of the object that each patch shows, and whether it shows one.

    Args:
        logits: [B, patches, classes], in the order of `patch_classes`.
        scenes: B scenes.
        owner: [B, patches], see `Batch.owners`.
    """
    is_object = owner >= 0
    classes = patch_classes(scenes.domain)
    *attribute_logits, object_logit = logits.split(list(classes.values()), dim=-1)
    loss = F.binary_cross_entropy_with_logits(object_logit[..., 0], is_object.float())
    for name, prediction in zip(list(classes)[:-1], attribute_logits, strict=True):
        target = getattr(scenes, name).gather(1, owner.clamp(min=0)).masked_fill(~is_object, -100)
        loss = loss + F.cross_entropy(prediction.flatten(0, 1), target.flatten())
    return loss
