"""The batches of the demo teacher's training: scenes with twins, captions, and what is true of what."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.demo.clip_model import IMAGE_SIZE, PATCH_SIZE
from scripts.demo.scene_supervision import make_twins, patch_owners
from sf_mllm.data.scenes.caption_edits import wrong_captions
from sf_mllm.data.scenes.captions import (
    Captions,
    all_phrases,
    count_captions,
    count_families,
    list_captions,
    may_hold,
    phrases_hold,
    relation_captions,
)
from sf_mllm.data.scenes.domains import DOMAINS
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.render import render
from sf_mllm.data.scenes.sampling import Scenes, ScenesConfig, concatenate, sample_scenes
from sf_mllm.data.scenes.words import tokenize

WRONG_TEXTS = 1  # wrong versions of each caption
PHASES = ((0.04, 1), (0.1, 2), (0.2, 4), (1.0, 8))  # (until this share of the run, most objects)
CROWDED = 5  # objects from which on scenes are hard; in the last phase every second scene has as many
_CAPTION_KINDS: tuple[Callable[[Scenes, Draws], Captions], ...] = (
    list_captions,
    relation_captions,
    relation_captions,
    count_captions,
)  # lists first: the others are short and encoded together; each call draws another relation
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
    phrases: Tensor  # [P, phrase length of the domain] tokens of every caption of one object
    phrases_hold: Tensor  # [P, B] bool, which of them are true of which scene
    phrase_counts: list[int]  # how many phrases in a row state the same attributes; sums to P
    owners: Tensor  # [B, patches] slot of the object that each patch shows, or -1

    @property
    def lists(self) -> Tensor:
        """Tokens of the lists: [(1 + WRONG_TEXTS) * B, context length of the domain]."""
        return self.groups[0].tokens

    @property
    def short(self) -> Tensor:
        """Tokens of all other captions: [3 * (1 + WRONG_TEXTS) * B, short length of the domain]."""
        length = DOMAINS[self.scenes.domain].short_length
        return torch.cat([group.tokens[:, :length] for group in self.groups[1:]])


class BatchMaker:
    """Makes the batches of a run; the same arguments give the same batch.

    A batch takes several hundred small kernels. On CUDA they are captured once and replayed as one graph, since
    launching them one by one would take as long as the training step itself; such a batch lives until the next one.

    Args:
        batch_size: originals and twins together.
        seed: of the run.
        device: to work on.
        domain: of the scenes, one of DOMAINS.
        compiles: compile what is costly.
    """

    def __init__(
        self, batch_size: int, seed: int, device: str, *, domain: str = "plain", compiles: bool = False
    ) -> None:
        self.seed, self.domain = seed, domain
        self.indices = torch.zeros(batch_size // 2, dtype=torch.int64, device=device)
        self._render = torch.compile(render, dynamic=False) if compiles else render
        self._may_hold = torch.compile(may_hold, dynamic=False) if compiles else may_hold
        self._phrases_hold = torch.compile(phrases_hold, dynamic=False) if compiles else phrases_hold
        self._phrases = all_phrases(device, domain)
        self._phrase_tokens = tokenize(self._phrases)[:, : DOMAINS[domain].phrase_length]
        self._phrase_counts = count_families(self._phrases)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Batch]] = {}  # by the most objects in a scene

    def make(self, step: int, progress: float) -> Batch:
        """Make the batch of a step.

        Args:
            step: number of the batch.
            progress: 0..1, decides the phase of the curriculum.
        """
        max_objects = next(objects for until, objects in PHASES if progress <= until)
        start = step * len(self.indices)
        torch.arange(start, start + len(self.indices), out=self.indices)
        if self.indices.device.type != "cuda":
            return self._build(max_objects)
        if max_objects not in self._graphs:
            self._graphs[max_objects] = self._capture(max_objects)
        graph, batch = self._graphs[max_objects]
        graph.replay()
        return batch

    def _capture(self, max_objects: int) -> tuple[torch.cuda.CUDAGraph, Batch]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and fills caches of constants, which a capture cannot
            self._build(max_objects)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch = self._build(max_objects)
        return graph, batch

    def _build(self, max_objects: int) -> Batch:
        least = CROWDED if max_objects > CROWDED else 1
        originals = concatenate(
            [
                sample_scenes(part, ScenesConfig(self.seed, min_objects, max_objects, domain=self.domain))
                for part, min_objects in zip(self.indices.chunk(2), (1, least), strict=True)
            ]
        )
        scenes = concatenate((originals, make_twins(originals, Draws(self.seed + _TWIN_SEED_OFFSET, self.indices))))
        indices = torch.cat((self.indices, self.indices))  # twins get captions of the same structure
        draws = Draws(self.seed + _CAPTION_SEED_OFFSET, indices)
        wrong_indices = torch.cat([WRONG_TEXTS * indices + number for number in range(WRONG_TEXTS)])
        wrong_draws = Draws(self.seed + _WRONG_SEED_OFFSET, wrong_indices)
        groups = [self._add_wrong(scenes, kind(scenes, draws), wrong_draws) for kind in _CAPTION_KINDS]
        return Batch(
            scenes=scenes,
            pixels=self._render(scenes, IMAGE_SIZE),
            groups=groups,
            phrases=self._phrase_tokens,
            phrases_hold=self._phrases_hold(self._phrases, scenes),
            phrase_counts=self._phrase_counts,
            owners=patch_owners(scenes, IMAGE_SIZE // PATCH_SIZE),
        )

    def _add_wrong(self, scenes: Scenes, captions: Captions, wrong_draws: Draws) -> CaptionGroup:
        """Add wrong versions to one caption of each scene, and find out what is true of what."""
        wrong = wrong_captions(concatenate([captions] * WRONG_TEXTS), wrong_draws)
        return CaptionGroup(
            tokens=tokenize(concatenate((captions, wrong))),
            holds=self._may_hold(captions, scenes, all_pairs=True),
            wrong_holds=self._may_hold(wrong, concatenate([scenes] * WRONG_TEXTS)).view(WRONG_TEXTS, -1).T,
        )
