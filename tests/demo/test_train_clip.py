import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from scripts.demo.clip_batch import WRONG_TEXTS, BatchMaker
from scripts.demo.clip_model import WEIGHTS_FILE, build_model, build_tokenizer, model_config
from scripts.demo.clip_step import (
    TeacherTask,
    contrastive_losses,
    patch_loss,
    phrase_loss,
    split_text,
)
from scripts.demo.scene_supervision import make_twins, patch_owners
from scripts.demo.train_clip import main
from sf_mllm.data.scenes.captions import (
    count_captions,
    full_captions,
    list_captions,
    may_hold,
    phrase_captions,
    relation_captions,
)
from sf_mllm.data.scenes.domains import DOMAINS, MAX_OBJECTS, UNIT
from sf_mllm.data.scenes.draws import Draws
from sf_mllm.data.scenes.language import objects_of
from sf_mllm.data.scenes.sampling import ScenesConfig, sample_scenes
from sf_mllm.data.scenes.words import PAD, WORDS, tokenize

INDICES = torch.arange(400)
PLAIN = DOMAINS["plain"]


def make_batch(step, batch_size, seed, progress):
    return BatchMaker(batch_size, seed, "cpu").make(step, progress)


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(INDICES, ScenesConfig(seed=31))


@pytest.fixture(scope="module")
def twins(scenes):
    return make_twins(scenes, Draws(32, INDICES))


def test_twins_differ_by_one_edit_and_stay_valid(scenes, twins):
    pair = twins.present[:, :, None] & twins.present[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
    distance = ((twins.x[:, :, None] - twins.x[:, None]) ** 2 + (twins.y[:, :, None] - twins.y[:, None]) ** 2).sqrt()
    assert (distance - twins.radius[:, :, None] - twins.radius[:, None])[pair].min() > 0.009 * UNIT
    edits = set()
    for before, after in zip(objects_of(scenes), objects_of(twins), strict=True):
        assert [item.size for item in after] == [item.size for item in before][: len(after)]
        if len(after) < len(before):
            assert after == before[:-1]
            edits.add("drop")
            continue
        same_places = [(item.x, item.y) for item in before] == [(item.x, item.y) for item in after]
        changed = [(a, b) for a, b in zip(before, after, strict=True) if (a.color, a.shape) != (b.color, b.shape)]
        if not same_places:
            assert not changed
            expected = [
                [(item.x, UNIT - item.y) for item in before],
                [(UNIT - item.x, item.y) for item in before],
                [(item.y, item.x) for item in before],
            ]
            edits.add(("flip", "mirror", "transpose")[expected.index([(item.x, item.y) for item in after])])
        elif len(changed) == 2:
            (a, new_a), (b, new_b) = changed
            assert (new_a.color, new_b.color) in ((a.color, b.color), (b.color, a.color))
            assert (new_a.shape, new_b.shape) in ((a.shape, b.shape), (b.shape, a.shape))
            edits.add(("swap", new_a.color == b.color, new_a.shape == b.shape))
        else:
            assert len(changed) == 1
            old, new = changed[0]
            assert (old.color != new.color) + (old.shape != new.shape) == 1
            edits.add("color" if old.color != new.color else "shape")
    assert {"drop", "flip", "mirror", "transpose", "color", "shape"} < edits
    assert {("swap", True, True), ("swap", True, False), ("swap", False, True)} < edits


@pytest.mark.parametrize("kind", [list_captions, phrase_captions, relation_captions, count_captions])
def test_twins_get_the_same_caption_but_for_the_edit(scenes, twins, kind):
    captions = tokenize(kind(scenes, Draws(5, INDICES)))
    twin_captions = tokenize(kind(twins, Draws(5, INDICES)))
    same_count = scenes.count == twins.count
    same_length = (captions != PAD).sum(dim=1) == (twin_captions != PAD).sum(dim=1)
    assert same_length[same_count].float().mean() > 0.9
    full = full_captions(scenes, scenes.count > 0)
    assert may_hold(full, twins).float().mean() < 0.1  # true of both only where the edit changes no place


def test_patch_owners_follow_distance(scenes):
    some = scenes.select(slice(0, 30))
    owners = patch_owners(some, 14).view(30, 14, 14)
    for index in range(30):
        for row in range(14):
            for column in range(14):
                y, x = (row + 0.5) * UNIT / 14, (column + 0.5) * UNIT / 14
                inside = [
                    slot
                    for slot in range(int(some.count[index]))
                    if math.hypot(x - some.x[index, slot], y - some.y[index, slot])
                    <= max(some.radius[index, slot].item(), UNIT / 14 / math.sqrt(2)) - 1
                ]
                if inside:
                    assert owners[index, row, column] in inside
        cells = (some.y[index] * 14 // UNIT, some.x[index] * 14 // UNIT)
        assert (owners[index][cells][: some.count[index]] >= 0).all()
    assert (owners >= 0).float().mean() < 0.4


@pytest.mark.parametrize("number", range(4))
def test_losses_equal_a_plain_loop(number):
    group = make_batch(3, 12, seed=0, progress=0.5).groups[number]
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(12, 5, generator=generator), dim=-1)
    text = F.normalize(torch.randn(12 * (1 + WRONG_TEXTS), 5, generator=generator), dim=-1)
    scale = torch.tensor(7.0)

    def cross_entropy(right: float, others: list[float]) -> float:
        return math.log(sum(math.exp(value - right) for value in [right, *others]))

    similarity = (7 * image @ text.T).tolist()  # [images][texts]
    info_nce, wrong, twin = [], [], []
    for i in range(12):
        own = similarity[i][i]
        info_nce.append(cross_entropy(own, [similarity[i][t] for t in range(12) if t != i and not group.holds[t, i]]))
        info_nce.append(cross_entropy(own, [similarity[b][i] for b in range(12) if b != i and not group.holds[i, b]]))
        negatives = [similarity[i][12 * (k + 1) + i] for k in range(WRONG_TEXTS) if not group.wrong_holds[i, k]]
        wrong.append(cross_entropy(own, negatives))
        j = (i + 6) % 12
        twin.append(cross_entropy(own, [] if group.holds[j, i] else [similarity[i][j]]))
        twin.append(cross_entropy(own, [] if group.holds[i, j] else [similarity[j][i]]))
    expected = torch.tensor([sum(values) / len(values) for values in (info_nce, wrong, twin)])
    torch.testing.assert_close(contrastive_losses(image, text, scale, group), expected)


def test_phrase_loss_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(3, 5, generator=generator), dim=-1).requires_grad_()
    phrases = F.normalize(torch.randn(9, 5, generator=generator), dim=-1)
    holds = torch.rand(9, 3, generator=generator) < 0.4
    holds[0], holds[4] = True, False
    holds[4:6, 0], holds[6:, 1] = True, False  # a set of attributes with no false phrase, one with no true phrase
    counts = [4, 2, 3]
    loss = phrase_loss(image, phrases, torch.tensor(4.0), holds, counts)
    logits = (4 * image @ phrases.T).double().detach()
    losses = []
    for i in range(3):
        start = 0
        for count in counts:
            some, are_true = logits[i, start : start + count].exp(), holds[start : start + count, i]
            false = some[~are_true].sum()
            each = [-(value / (value + false)).log() for value in some[are_true]]
            losses.append(sum(each, torch.tensor(0.0).double()) / max(len(each), 1))
            start += count
    torch.testing.assert_close(loss, torch.stack(losses).mean().float())
    loss.backward()
    assert image.grad.isfinite().all()


def test_perfect_patch_predictions_cost_nothing():
    batch = make_batch(0, 8, seed=0, progress=0.5)
    owner = patch_owners(batch.scenes, 14)
    slot = owner.clamp(min=0)
    logits = [
        100.0 * F.one_hot(values.gather(1, slot).clamp(min=0), number).float()
        for values, number in ((batch.scenes.color, 8), (batch.scenes.shape, 8), (batch.scenes.size, 3))
    ]
    is_object = torch.where(owner >= 0, 100.0, -100.0)[..., None]
    assert patch_loss(torch.cat((*logits, is_object), dim=-1), batch.scenes, owner) < 1e-6
    assert patch_loss(torch.cat((*logits, -is_object), dim=-1), batch.scenes, owner) > 50


def test_batches_are_repeatable_and_follow_the_curriculum():
    first, again = (make_batch(5, 16, seed=3, progress=0.9) for _ in range(2))
    torch.testing.assert_close(first.pixels, again.pixels, rtol=0, atol=0)
    other = make_batch(6, 16, seed=3, progress=0.9)
    for group, same, different in zip(first.groups, again.groups, other.groups, strict=True):
        torch.testing.assert_close(group.tokens, same.tokens, rtol=0, atol=0)
        assert group.holds.diagonal().all()
        assert different.tokens.ne(group.tokens).any()
    progress = (0.0, 0.1, 0.15, 0.9)
    counts = make_batch(5, 64, seed=3, progress=0.9).scenes.count
    assert counts[16:32].min() >= 4 and counts[:16].min() < 4  # every second original is crowded; some find no room
    most = [make_batch(5, 64, seed=3, progress=value).scenes.count.max() for value in progress]
    assert [int(value) for value in most] == [1, 2, 4, 8]


def test_short_text_gets_the_features_of_padded_text():
    batch = make_batch(2, 8, seed=0, progress=0.9)
    task = TeacherTask(build_model(model_config(64, 1, 2, 16), seed=0)).eval()
    with torch.no_grad():
        _, text, phrases, _ = task(batch.pixels, batch.lists, batch.short, batch.phrases)
        some = F.pad(batch.phrases[:50], (0, PLAIN.context_length - PLAIN.phrase_length), value=PAD)
        torch.testing.assert_close(phrases[:50], task.clip.encode_text(some, normalize=True))
        for features, group in zip(split_text(text, batch), batch.groups, strict=True):
            assert (group.tokens[:, PLAIN.short_length :] == PAD).all() or group is batch.groups[0]
            torch.testing.assert_close(features, task.clip.encode_text(group.tokens, normalize=True))


def test_tokenizer_reads_captions_as_the_tensors_do(scenes):
    kinds = (list_captions, phrase_captions, relation_captions, count_captions)
    tokens = torch.cat([tokenize(kind(scenes, Draws(5, INDICES))) for kind in kinds])
    texts = [" ".join(WORDS[token] for token in row if WORDS[token][0] != "<") for row in tokens.tolist()]
    tokenizer = build_tokenizer(PLAIN.context_length)
    torch.testing.assert_close(tokenizer(texts, padding="max_length", return_tensors="pt").input_ids, tokens)
    loose = tokenizer("A red circle, and the Blue star.").input_ids
    assert loose == tokenizer("red circle blue star").input_ids and WORDS.index("<unk>") not in loose


def test_short_run_writes_a_model_that_open_clip_loads(tmp_path, capsys):
    out = tmp_path / "clip"
    size = ["--width", "64", "--layers", "1", "--text-layers", "1", "--embed-dim", "8"]
    arguments = ["--out", str(out), "--steps", "3", "--batch-size", "8", "--samples", "8", "--no-compile", *size]
    assert main([*arguments, "--device", "cpu", "--evaluate-every-s", "0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert len(rows[-1]["final"]) == 9 and rows[-1]["step"] == 3 and rows[-1]["images"] == 24
    assert set(rows[0]["zero_shot"]) == {item["task"] for item in rows[-1]["final"]}

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    fresh = build_model(model_config(64, 1, 1, 8), seed=0)
    with safe_open(out / WEIGHTS_FILE, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    assert set(stored) == set(fresh.state_dict())
    for name, tensor in model.state_dict().items():
        assert stored[name].dtype == torch.float16
        torch.testing.assert_close(tensor, stored[name].float(), rtol=0, atol=0)
    matrices = [name for name, tensor in stored.items() if tensor.dim() >= 2]
    assert not [name for name in matrices if torch.equal(fresh.state_dict()[name].half(), stored[name])]  # all trained
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["red circle top-left"])
    assert tokens.tolist() == [[1, *(WORDS.index(w) for w in ("red", "circle", "top-left")), 2, *[0] * 27]]
    assert model.visual.preprocess_cfg["size"] == (224, 224)

    assert main(arguments) == 2  # never over an existing model
    assert "is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--batch-size", "7"], ["--width", "100"], ["--steps", "0"], ["--seconds", "-1"], ["--seed", "-1"]]
)
def test_impossible_settings_are_refused(tmp_path, capsys, arguments):
    assert main(["--out", str(tmp_path / "clip"), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "clip").exists()
