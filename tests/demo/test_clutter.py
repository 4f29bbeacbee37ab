"""The demo teacher's training on cluttered scenes."""

import json

import open_clip
import pytest
import torch

from scripts.demo.clip_batch import BatchMaker
from scripts.demo.clip_model import build_tokenizer
from scripts.demo.clip_step import patch_classes, patch_loss
from scripts.demo.scene_supervision import make_twins, patch_owners
from scripts.demo.train_clip import main
from sf_mllm.data.scenes.captions import count_captions, list_captions, phrase_captions, relation_captions
from sf_mllm.data.scenes.domains import DOMAINS, SHAPES
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes, tensor_fields
from sf_mllm.data.scenes.words import WORDS, tokenize

INDICES = torch.arange(500)
CLUTTER = DOMAINS["clutter"]


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(INDICES, ScenesConfig(seed=31, domain="clutter"))


@pytest.fixture(scope="module")
def twins(scenes):
    return make_twins(scenes, Draws(32, INDICES))


def test_twins_differ_and_can_be_told_for_what_they_are(scenes, twins):
    assert twins.domain == "clutter" and twins.is_legible.all()
    torch.testing.assert_close(twins.update_hidden().hidden, twins.hidden, rtol=0, atol=0)
    for name in ("background", "background_rgb", "doodles", "grain", "exposure"):
        torch.testing.assert_close(getattr(scenes, name), getattr(twins, name), rtol=0, atol=0)
    names = ("count", "size", "color", "shape", "texture", "x", "y", "radius", "angle")
    changed = {name: (getattr(scenes, name) != getattr(twins, name)).view(500, -1) for name in names}
    assert torch.cat(list(changed.values()), dim=1).any(dim=1).all()

    is_depth = (changed["radius"] & (scenes.count == twins.count)[:, None]).any(dim=1)
    for index in is_depth.nonzero()[:, 0].tolist():
        moved = changed["radius"][index].nonzero()[:, 0].tolist()
        assert (
            len(moved) == 2 and scenes.hidden[index, moved[1], moved[0]] > 0 < twins.hidden[index, moved[1], moved[0]]
        )
        for name in (*names[1:], "tint"):
            before, after = getattr(scenes, name)[index], getattr(twins, name)[index]
            torch.testing.assert_close(before[moved], after[moved[::-1]], rtol=0, atol=0)
    assert is_depth.sum() > 10
    same_colors = ~changed["color"].any(dim=1) & (scenes.count == twins.count) & ~is_depth
    assert (changed["texture"].sum(dim=1)[same_colors] == 2).sum() > 10  # exchanged
    assert (changed["texture"].sum(dim=1)[same_colors] == 1).sum() > 5  # replaced
    replaced = changed["shape"] & (changed["shape"].sum(dim=1) == 1)[:, None] & (twins.shape >= 0)
    was_glyph, is_glyph = scenes.shape[replaced] >= len(SHAPES), twins.shape[replaced] >= len(SHAPES)
    assert torch.equal(was_glyph, is_glyph) and len(was_glyph) > 20


def test_an_illegible_scene_is_told(scenes):
    assert scenes.is_legible.all()
    covered = scenes.hidden.clone()
    covered[0, 1, 0] = 400
    for name, value in (("hidden", covered), ("texture", torch.where(scenes.size == 0, 1, scenes.texture))):
        edited = type(scenes)(**tensor_fields(scenes) | {name: value}, domain="clutter")
        expected = ~(scenes.size == 0).any(dim=1) if name == "texture" else INDICES > 0
        assert torch.equal(edited.is_legible, expected)


def test_patches_belong_to_the_object_whose_centre_is_nearest(scenes):
    owners = patch_owners(scenes, 56).view(500, 56, 56)
    for index in range(40):
        cells = (scenes.y[index] * 56 // 4096, scenes.x[index] * 56 // 4096)
        count = int(scenes.count[index])
        assert owners[index][cells][:count].tolist() == list(range(count))  # overlapping ones too


def test_perfect_patch_predictions_cost_nothing():
    batch = BatchMaker(8, 0, "cpu", domain="clutter").make(0, progress=0.5)
    classes = patch_classes("clutter")
    assert classes == {"color": 8, "shape": 44, "size": 4, "texture": 4, "object": 1}
    owner = patch_owners(batch.scenes, 14)
    slot = owner.clamp(min=0)
    logits = [
        100.0 * torch.nn.functional.one_hot(getattr(batch.scenes, name).gather(1, slot).clamp(min=0), number).float()
        for name, number in list(classes.items())[:-1]
    ]
    is_object = torch.where(owner >= 0, 100.0, -100.0)[..., None]
    assert patch_loss(torch.cat((*logits, is_object), dim=-1), batch.scenes, owner) < 1e-6
    assert patch_loss(torch.cat((*logits, -is_object), dim=-1), batch.scenes, owner) > 50


def test_batch_holds_the_domains_captions():
    batch = BatchMaker(8, 0, "cpu", domain="clutter").make(3, progress=0.9)
    assert batch.lists.shape[1] == CLUTTER.context_length and batch.short.shape[1] == CLUTTER.short_length
    assert all((group.tokens[:, CLUTTER.short_length :] == 0).all() for group in batch.groups[1:])
    assert all(group.holds.diagonal().all() for group in batch.groups)
    torch.testing.assert_close(batch.phrases_hold.any(dim=0), torch.ones(8, dtype=torch.bool), rtol=0, atol=0)


def test_tokenizer_reads_captions_as_the_tensors_do(scenes):
    kinds = (list_captions, phrase_captions, relation_captions, count_captions)
    tokens = torch.cat([tokenize(kind(scenes, Draws(5, INDICES))) for kind in kinds])
    texts = [
        " ".join(WORDS[token] for token in row if WORDS[token][0] != "<").replace("_", " ") for row in tokens.tolist()
    ]
    tokenizer = build_tokenizer(CLUTTER.context_length)
    torch.testing.assert_close(tokenizer(texts, padding="max_length", return_tensors="pt").input_ids, tokens)
    loose = tokenizer("A tiny Letter A, and the digit 3 in front of two letters A.").input_ids
    words = [WORDS[token] for token in loose]
    assert words == "<bos> tiny letter_a digit_3 in front of <unk> letters_a <eos>".split()


def test_short_run_writes_a_model_that_knows_the_domains_words(tmp_path):
    out = tmp_path / "clip"
    size = ["--width", "64", "--layers", "1", "--text-layers", "1", "--embed-dim", "8"]
    arguments = ["--out", str(out), "--steps", "2", "--batch-size", "8", "--samples", "2", "--no-compile", *size]
    assert main([*arguments, "--device", "cpu", "--domain", "clutter"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    tasks = [item["task"] for item in rows[-1]["final"]]
    assert {"texture", "glyph", "tiny_glyph", "front"} < set(tasks) and len(tasks) == 13
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["striped letter a behind circle"])
    assert tokens.shape == (1, CLUTTER.context_length)
    assert [WORDS[token] for token in tokens[0, :6]] == ["<bos>", "striped", "letter_a", "behind", "circle", "<eos>"]
