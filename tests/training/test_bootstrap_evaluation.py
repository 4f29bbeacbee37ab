import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from eval.roi_stats import measure
from eval.zero_shot import evaluate_directory
from sf_mllm.config import load_run_config
from sf_mllm.data.scenes.tasks import SceneImages
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.training.bootstrap.__main__ import main
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.evaluation import describe_evaluation
from sf_mllm.training.bootstrap.region_snapshots import RegionSnapshot, load_snapshots, save_snapshot
from sf_mllm.training.bootstrap.run import run_bootstrap
from sf_mllm.training.bootstrap.teachers import OpenClipTeacher
from tests.training.conftest import CLIP_CONFIG

SAMPLES = 5


@pytest.fixture(scope="module")
def reading_clip(tmp_path_factory):
    """A tiny random CLIP that knows all words, and sees 32 pixels."""
    directory = tmp_path_factory.mktemp("reading_clip")
    settings = {**CLIP_CONFIG, "text_cfg": {**CLIP_CONFIG["text_cfg"], "context_length": 24, "vocab_size": 49408}}
    torch.manual_seed(0)
    clip = open_clip.CLIP(**settings)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    preprocessing = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": preprocessing})
    )
    return directory


@pytest.fixture
def class_folder(tmp_path):
    for number, name in enumerate(("red_apple", "lime", "sky")):
        (tmp_path / "things" / name).mkdir(parents=True)
        for index in range(4):
            color = [60 * index] * 3
            color[number] = 250
            Image.new("RGB", (40, 30), tuple(color)).save(tmp_path / "things" / name / f"{index}.png")
    return tmp_path / "things"


def run(run_file, clip, *overrides):
    """Three steps at the teacher's own size, evaluated before the first one and after the second and the third."""
    config = load_run_config(
        BootstrapConfig,
        run_file,
        [
            f"teacher.model=local-dir:{clip}",
            "data.resolution=32",
            "train.max_steps=3",
            "train.eval_steps=2",
            "train.eval_on_start=true",
            f"evaluation.samples={SAMPLES}",
            *overrides,
        ],
    )
    encoder = run_bootstrap(config)
    rows = [json.loads(line) for line in (encoder.parent / "metrics.jsonl").read_text().splitlines()]
    return encoder, [row for row in rows if "eval_tokens_cosine" in row]


def test_scores_in_a_run_are_those_of_the_commands(run_file, reading_clip, caplog):
    caplog.set_level(logging.INFO, "sf_mllm")
    encoder, rows = run(run_file, reading_clip, "evaluation.zero_shot=scenes")
    assert [row["step"] for row in rows] == [0, 2, 3]
    record = json.loads((encoder.parent / "run.json").read_text())["evaluation"]
    student = evaluate_directory(reading_clip, encoder, samples=SAMPLES)
    teacher = evaluate_directory(reading_clip, samples=SAMPLES)
    assert len(student) == 9
    for own, known in zip(student, teacher, strict=True):
        assert rows[-1][f"eval_{own.task}_accuracy"] == record[f"eval_{own.task}_accuracy"] == own.accuracy
        assert {row[f"eval_{own.task}_teacher_accuracy"] for row in rows} == {known.accuracy}  # taken once
        assert rows[-1][f"eval_{own.task}_samples"] == SAMPLES
        assert rows[-1][f"eval_{own.task}_chance"] == pytest.approx(own.chance)
    regions = measure(str(encoder), SAMPLES, "cpu")
    for name in ("roi_objects_covered", "roi_object_share", "roi_object_share_of_image"):
        assert record[f"eval_{name}"] == pytest.approx(regions[name], abs=1e-6)
    assert record["eval_roi_center_spread"] != pytest.approx(regions["roi_center_spread"])  # that of held-out images
    assert all(type(value) in (int, float) and math.isfinite(value) for row in rows for value in row.values())
    lines = [line for line in caplog.text.splitlines() if "step 3/3" in line and "agreement" in line]
    assert len(lines) == 1 and "color" in lines[0] and "_chance" not in lines[0]


def test_only_encoders_run_in_low_precision(run_file, reading_clip, monkeypatch):
    seen = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((SceneImages, "pixels"), (F, "normalize"), (OpenClipTeacher, "forward")):
        watch(owner, name)
    run(run_file, reading_clip, "evaluation.zero_shot=scenes", "train.bf16=true")
    assert set(seen) == {("pixels", False), ("normalize", False), ("forward", True)}


def test_two_processes_measure_what_one_does(run_file, reading_clip, tmp_path):
    """Five samples a task and three held-out images do not divide by two; nothing is learned, so nothing may differ."""
    settings = ["evaluation.zero_shot=scenes", "train.learning_rate=0", "inherited_learning_rate=0"]
    _, alone = run(run_file, reading_clip, *settings)
    arguments = [f"teacher.model=local-dir:{reading_clip}", "data.resolution=32", f"evaluation.samples={SAMPLES}"]
    arguments += ["train.max_steps=1", "train.eval_steps=1", "train.per_device_train_batch_size=2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, "-m", "sf_mllm.training.bootstrap", str(run_file), *settings, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, f"output_dir={tmp_path / 'two'}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    together = next(row for row in map(json.loads, lines) if "eval_tokens_cosine" in row)
    measured = {name: value for name, value in alone[0].items() if name.startswith("eval_")}
    assert len(measured) > 40
    assert {name: together[name] for name in measured} == pytest.approx(measured, abs=1e-6)
    snapshots = [load_snapshots(tmp_path / name)[0] for name in ("run", "two")]
    torch.testing.assert_close(snapshots[0].rois, snapshots[1].rois)
    assert torch.equal(snapshots[0].pixel_values, snapshots[1].pixel_values)


def test_classes_of_a_folder_are_scored_with_prompts(run_file, reading_clip, class_folder):
    prompts = ["a {}", "a drawing of a {}."]
    encoder, rows = run(
        run_file,
        reading_clip,
        f"evaluation.zero_shot={class_folder}",
        "evaluation.samples=100",
        f"evaluation.prompts={prompts}",
    )
    options = {"tasks": str(class_folder), "prompts": prompts, "samples": 100}
    (student,) = evaluate_directory(reading_clip, encoder, **options)
    (teacher,) = evaluate_directory(reading_clip, **options)
    assert (student.samples, student.chance) == (12, pytest.approx(1 / 3))
    assert rows[-1]["eval_things_accuracy"] == student.accuracy
    assert rows[-1]["eval_things_teacher_accuracy"] == teacher.accuracy
    assert "eval_roi_objects_covered" not in rows[-1]  # nobody knows where their objects are


def test_the_first_and_the_last_regions_are_kept(run_file, clip_directory):
    encoder, _ = run(run_file, clip_directory, "data.held_out=11", "train.per_device_eval_batch_size=4")
    first, last = load_snapshots(encoder.parent)
    assert (first.step, last.step) == (0, 3)
    assert first.pixel_values.shape == (8, 3, 32, 32) and torch.equal(first.pixel_values, last.pixel_values)
    model = SparseFormerModel.from_pretrained(encoder).eval()
    pixels = (last.pixel_values / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.25]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(last.rois, model(pixels).rois[:, -1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first.rois, last.rois, atol=1e-4)


def test_a_run_that_begins_anew_replaces_its_first_regions(tmp_path):
    def save(step, value):
        save_snapshot(
            tmp_path, RegionSnapshot(step, torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 1, 4), value))
        )

    def kept():
        return [(snapshot.step, snapshot.rois[0, 0, 0].item()) for snapshot in load_snapshots(tmp_path)]

    assert load_snapshots(tmp_path) == []
    save(4, 1.0)
    assert kept() == [(4, 1.0)]
    save(8, 2.0)
    assert kept() == [(4, 1.0), (8, 2.0)]
    save(4, 3.0)
    save(6, 4.0)
    assert kept() == [(4, 3.0), (6, 4.0)]
    assert sorted(path.name for path in (tmp_path / "regions").iterdir()) == ["first.safetensors", "last.safetensors"]


def test_a_line_for_a_person():
    row = {
        "step": 5,
        "eval_embedding_cosine": 0.98765,
        "eval_tokens_cosine": 0.9,
        "eval_roi_center_spread": 0.1512,
        "eval_roi_points_outside": 0.0049,
    }
    assert describe_evaluation({"loss": 1.0}) is None
    assert describe_evaluation(row) == (
        "agreement 0.9877 (tokens 0.9000)  regions: spread 0.151, 0.5 % of points outside"
    )
    row |= {
        "eval_swap_accuracy": 0.981,
        "eval_swap_teacher_accuracy": 1.0,
        "eval_swap_chance": 0.5,
        "eval_swap_samples": 9,
    }
    assert describe_evaluation(row).endswith("outside  teacher knows none: swap 98.1")
    row |= {"eval_mean_retention": 0.9949, "eval_roi_objects_covered": 0.9961, "eval_class_agreement": 0.5}
    assert describe_evaluation(row) == (
        "agreement 0.9877 (tokens 0.9000), same class 50.0 %  regions: spread 0.151, 0.5 % of points outside, "
        "99.6 % of objects covered  retention 99.49 %: swap 98.1"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.zero_shot=scene"], "Did you mean 'scenes'"),
        (["evaluation.zero_shot=/nowhere"], "'/nowhere' are neither built in nor a folder"),
        (["evaluation.samples=1"], "evaluation.samples must be at least 2, got 1"),
        (["evaluation.prompts=[a photo]"], 'evaluation.prompts must be one or more sentences with "{}"'),
        (["evaluation.prompts=[]"], "evaluation.prompts must be one or more"),
        (["evaluation.zeroshot=scenes"], "Did you mean 'zero_shot'"),
    ],
)
def test_bad_settings_end_with_one_line(run_file, overrides, message, capfd):
    assert main([str(run_file), *overrides]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_the_speed_is_that_of_training_alone(run_file, clip_directory, monkeypatch):
    """Evaluations that take a thousand seconds on the clock, between steps that take next to none."""
    import sf_mllm.training.progress as progress
    from sf_mllm.training.bootstrap.evaluation import BootstrapEvaluation

    offset = [0.0]
    clock = progress.time.monotonic
    measure_really = BootstrapEvaluation.measure

    def measure_slowly(self, trainer):
        offset[0] += 1000.0
        return measure_really(self, trainer)

    monkeypatch.setattr(progress.time, "monotonic", lambda: clock() + offset[0])
    monkeypatch.setattr(BootstrapEvaluation, "measure", measure_slowly)
    encoder, rows = run(run_file, clip_directory, "train.logging_steps=1", "train.eval_steps=1")
    assert len(rows) == 4
    logged = [json.loads(line) for line in (Path(encoder).parent / "metrics.jsonl").read_text().splitlines()]
    assert min(row["samples_per_s"] for row in logged if "loss" in row) > 4 / 500
