import json
import math

import pytest
import timm
import torch

from scripts.demo import train_classifier
from scripts.demo.digit_images import main as export
from scripts.demo.digits import BACKGROUND, DIGITS, HELD_OUT_SEED, draw_digits
from scripts.demo.train_classifier import DigitTask, build_vit, evaluate, main
from sf_mllm.training.bootstrap.config import EvaluationConfig, TeacherConfig
from sf_mllm.training.bootstrap.teacher_texts import make_scorer
from sf_mllm.training.bootstrap.teachers import load_teacher

MODEL = "test_vit"  # 160 pixels, 6 blocks of width 64


def test_a_short_run_writes_a_classifier_that_timm_and_bootstrap_runs_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_classifier, "LOG_EVERY_STEPS", 1)
    out = tmp_path / "vit"
    arguments = ["--out", str(out), "--model", MODEL, "--device", "cpu", "--no-compile"]
    assert main([*arguments, "--steps", "3", "--batch-size", "8", "--samples", "40"]) == 0
    *steps, end = [json.loads(line) for line in (tmp_path / "vit.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3] and end["images"] == 24
    assert all(math.isfinite(row["loss"] + row["patch_loss"]) and 0 <= row["accuracy"] <= 1 for row in steps)

    vit = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    fresh = build_vit(MODEL, pretrained=False, seed=0)
    unchanged = [name for name, tensor in vit.state_dict().items() if torch.equal(tensor, fresh.state_dict()[name])]
    assert not unchanged  # all trained
    normalised = (draw_digits(torch.arange(40), HELD_OUT_SEED, 160).pixels / 255 - 0.5) / 0.5
    with torch.no_grad():
        right = vit(normalised).argmax(dim=-1) == draw_digits(torch.arange(40), HELD_OUT_SEED, 160).labels
    assert end["held_out_accuracy"] == pytest.approx(right.float().mean().item())

    config = TeacherConfig(source="timm", model=f"local-dir:{out}")
    teacher = load_teacher(config)
    assert teacher.vit.pretrained_cfg["label_names"] == list(DIGITS)
    assert teacher.output_kind == "logits" and teacher.preprocessing.image_size == 160
    assert export([str(tmp_path / "images"), "--count", "1", "--held-out", "60", "--device", "cpu"]) == 0
    evaluation = EvaluationConfig(zero_shot=str(tmp_path / "images" / "digits"))
    scorer = make_scorer(evaluation, config, teacher, image_size=160, device="cpu")
    assert scorer is not None and [task.name for task in scorer.tasks] == ["digits"]

    assert main(arguments) == 2  # never over an existing model
    assert "is not an empty directory" in capsys.readouterr().err


def test_losses_equal_a_plain_computation():
    task = DigitTask(build_vit(MODEL, pretrained=False, seed=0))
    pictures = draw_digits(torch.arange(6), 5, 160)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 10, generator=generator)
    patch_logits = torch.randn(6, 100, 11, generator=generator)
    log_odds = logits.log_softmax(dim=-1)
    picture_losses = [
        -0.9 * odds[label] - 0.1 * odds.mean() for odds, label in zip(log_odds, pictures.labels, strict=True)
    ]
    total = weights = torch.tensor(0.0)
    for odds, labels in zip(patch_logits.log_softmax(dim=-1), pictures.patch_labels(10, 10), strict=True):
        for own, label in zip(odds, labels.tolist(), strict=True):
            weight = 0.1 if label == BACKGROUND else 1.0
            total, weights = total - weight * own[label], weights + weight
    expected = torch.stack((torch.stack(picture_losses).mean(), total / weights))
    torch.testing.assert_close(task.losses(logits, patch_logits, pictures), expected)


def test_patch_logits_are_in_the_order_of_the_patch_labels():
    """A change of one patch changes its own logits most: before any block they depend on nothing else."""
    vit = build_vit(MODEL, pretrained=False, seed=0)
    vit.blocks = torch.nn.Identity()
    task = DigitTask(vit)
    black = torch.zeros(1, 3, 160, 160, dtype=torch.uint8)
    changed = black.clone()
    changed[:, :, 3 * 16 : 4 * 16, 7 * 16 : 8 * 16] = 255
    differs = (task(black)[1] != task(changed)[1]).any(dim=-1)[0]
    assert differs.nonzero()[:, 0].tolist() == [3 * 10 + 7]


def test_accuracy_counts_held_out_pictures():
    truth = draw_digits(torch.arange(300), HELD_OUT_SEED, 64)
    wrong = torch.arange(300) % 10 == 0
    answers = iter(torch.where(wrong, (truth.labels + 1) % 10, truth.labels).split(256))
    assert evaluate(lambda pixels: torch.nn.functional.one_hot(next(answers), 10), 300, 64, "cpu") == 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "nothing to train"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seed", "-1"], "Seed -1 is out of range"),
        (["--model", "vit_tinny_patch16_224"], "Did you mean 'vit_tiny_patch16_224'?"),
        (["--model", "resnet18"], "no VisionTransformer"),
        (["--rate", "1"], "Unrecognized arguments"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "vit"), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
