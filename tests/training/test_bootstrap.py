import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sf_mllm.config import load_run_config
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel, SparseFormerOutput
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap.__main__ import main
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.images import prepare_images
from sf_mllm.training.bootstrap.losses import average_in_rois
from sf_mllm.training.bootstrap.run import build_trainer, run_bootstrap
from sf_mllm.training.bootstrap.student import build_student, count_trained_blocks
from sf_mllm.training.bootstrap.task import BootstrapTask
from sf_mllm.training.bootstrap.teachers import load_teacher
from sf_mllm.training.run_folder import RunFolder
from tests.training.killed_runs import run_until_killed_at_step_5


def read(run_file, *overrides):
    return load_run_config(BootstrapConfig, run_file, overrides)


def make_trainer(config):
    run = RunFolder.open(config, config.output_dir)
    arguments = make_training_arguments(config.train, run.checkpoints, config.seed)
    return build_trainer(config, run, arguments)[0]


def weights_of(directory):
    return load_file(Path(directory) / "model.safetensors")


def rows_of(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_yaml_to_an_encoder_directory(run_file, caplog):
    assert main([str(run_file), "train.max_steps=4"]) == 0
    run = run_file.parent / "run"
    model = SparseFormerModel.from_pretrained(run / "encoder")
    assert model.config.num_tokens == 6
    processor = SparseFormerImageProcessor.from_pretrained(run / "encoder")
    assert dict(processor.size) == {"height": 40, "width": 40}
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    record = json.loads((run / "run.json").read_text())
    assert record["outcome"] == "complete" and record["tokens_per_image"] == 6
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["data"]["images"] == "14 images" and record["unreadable_images"] == 0
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert rows[0]["epoch"] == pytest.approx(2 * 4 / 11)  # 14 images, 3 held out
    weights = {"embedding": 1, "tokens": 1, "coverage": 1, "roi_hinge": 0.5, "point_hinge": 10}
    parts = sum(weight * rows[1][f"loss_{name}"] for name, weight in weights.items())
    assert rows[1]["loss"] == pytest.approx(parts, rel=1e-4)
    assert record["evaluation"]["eval_embedding_cosine"] == rows[2]["eval_embedding_cosine"]
    assert "step 2/4" in caplog.text

    before = weights_of(run / "encoder")
    assert main([str(run_file), "train.max_steps=4"]) == 0  # the same command again leaves it as it is
    assert "This run is complete" in caplog.text
    torch.testing.assert_close(weights_of(run / "encoder"), before, rtol=0, atol=0)
    shutil.rmtree(run / "encoder")  # as after a kill between the last checkpoint and the result
    assert main([str(run_file), "train.max_steps=4"]) == 0
    torch.testing.assert_close(weights_of(run / "encoder"), before, rtol=0, atol=0)
    assert [row["step"] for row in rows_of(run)] == [2, 4, 4]


def test_checkpoints_hold_the_student_only(run_file):
    config = read(run_file, "train.max_steps=3")
    run_bootstrap(config)
    saved = weights_of(Path(config.output_dir) / "checkpoints" / "checkpoint-3")
    assert saved.keys() == SparseFormerModel.from_pretrained(Path(config.output_dir) / "encoder").state_dict().keys()


@pytest.mark.parametrize("num_trained", [0, 1, 2])
def test_frozen_parts_stay_bit_identical_and_the_others_train(run_file, num_trained):
    config = read(run_file, f"student.trained_cortex_blocks={num_trained}", "train.max_steps=3")
    start, report = build_student(config, load_teacher(config.teacher))
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    after = weights_of(run_bootstrap(config))
    for name, tensor in after.items():
        block = int(name.split(".")[1]) if name.startswith("cortex.") else None
        is_frozen = name.startswith(("norm.", "projection.")) or (block is not None and block >= num_trained)
        assert torch.equal(tensor, before[name]) == is_frozen, name
    assert {name.split(".")[0] for name in report.copied} == {"cls_token", "cortex", "norm", "projection"}


@pytest.mark.parametrize(
    ("num_blocks", "first", "expected"),
    [(8, 4, 4), (16, 8, 8), (12, 0, 8), (4, 8, 0), (2, 1, 1)],
    ids=["base", "large", "all inherited", "few inherited", "tiny"],
)
def test_blocks_up_to_two_thirds_of_the_teacher_train(num_blocks, first, expected):
    assert count_trained_blocks(num_blocks, first) == expected


def test_a_killed_run_resumes_and_ends_with_the_same_weights(run_file):
    """8 steps over almost 3 epochs of random crops; killed after step 5 and resumed from 3, with workers."""
    undisturbed = weights_of(run_bootstrap(read(run_file, f"output_dir={run_file.parent / 'a'}")))
    overrides = [f"output_dir={run_file.parent / 'b'}", "train.dataloader_num_workers=2"]
    assert run_until_killed_at_step_5(str(run_file), *overrides) == -signal.SIGKILL
    config = read(run_file, *overrides)
    torch.testing.assert_close(weights_of(run_bootstrap(config)), undisturbed, rtol=0, atol=0)
    assert [row["step"] for row in rows_of(config.output_dir) if "loss" in row] == [2, 4, 6, 8]
    starts = json.loads((Path(config.output_dir) / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, "checkpoint-3"]


def test_the_loss_falls_on_few_images(run_file):
    config = read(run_file, "train.max_steps=60", "train.logging_steps=5", "data.min_crop_area=0.9", "data.flip=false")
    run_bootstrap(config)
    losses = [row["loss"] for row in rows_of(config.output_dir) if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]


def gradients_of_one_step(run_file, micro_batch, accumulation, *settings):
    config = read(
        run_file,
        *settings,
        f"output_dir={run_file.parent / str(micro_batch)}",
        "train.max_steps=1",
        "train.max_grad_norm=0",
        "train.optim=sgd",
        "train.learning_rate=1.0",
        "inherited_learning_rate=1.0",
        "train.eval_strategy=no",
        f"train.per_device_train_batch_size={micro_batch}",
        f"train.gradient_accumulation_steps={accumulation}",
    )
    trainer = make_trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


def test_accumulation_equals_a_larger_batch(run_file):
    """One step of 4 images and one of 2 x 2 give the same gradients."""
    at_once, accumulated = (gradients_of_one_step(run_file, *shares) for shares in ((4, 1), (2, 2)))
    assert any(gradient.abs().max() > 1e-4 for gradient in at_once.values())
    torch.testing.assert_close(accumulated, at_once, atol=1e-6, rtol=1e-4)


def test_inherited_and_new_parts_have_their_own_rates(run_file):
    trainer = make_trainer(read(run_file, "train.weight_decay=0.1", "inherited_learning_rate=0.0001"))
    optimizer = trainer.create_optimizer()
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    student = trainer.model
    assert found[id(student.cortex[0].attn.qkv.weight)] == (1e-4, 0.1)
    assert found[id(student.cortex[0].attn.qkv.bias)] == (1e-4, 0.0)
    assert found[id(student.cls_token)] == (1e-4, 0.0)
    assert found[id(student.stem.conv.weight)] == (3e-3, 0.1)
    assert found[id(student.focusing.narrow.norm1.weight)] == (3e-3, 0.0)
    for start_value in (student.initial.rois, student.initial.embedding, student.focusing.stage_embedding):
        assert found[id(start_value)] == (3e-3, 0.0)
    assert id(student.norm.weight) not in found
    assert len(found) == sum(p.requires_grad for p in student.parameters())


def test_student_and_teacher_see_the_same_crop_each_at_its_size(run_file):
    config = read(run_file)
    task = BootstrapTask(load_teacher(config.teacher), config.loss)
    white = (1 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.25])
    images = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    for size, side in ((None, 40), (task.teacher.preprocessing.image_size, 32)):
        torch.testing.assert_close(task.normalise(images, size), white.view(1, 3, 1, 1).expand(1, 3, side, side))
    seen = []
    task.teacher.register_forward_pre_hook(lambda teacher, inputs: seen.append(inputs[0]))
    student, _ = build_student(config, task.teacher)
    output = student(task.normalise(images), output_sampling_points=True)
    task.losses(output, task.targets({"pixel_values": images}))
    torch.testing.assert_close(seen, [task.normalise(images, 32)])


def test_a_perfect_student_has_no_loss(run_file):
    """It says what the teacher sees in its final regions, without the class token, and embeds as the teacher does."""
    config = read(run_file)
    task = BootstrapTask(load_teacher(config.teacher), config.loss)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    target = task.targets({"pixel_values": images})
    corner = 0.6 * torch.rand(2, 2, 5, 2)  # [B, steps, N, (x, y)]
    rois = torch.cat([corner, corner + 0.4], dim=-1)
    latents = average_in_rois(target.feature_map, rois[:, -1])
    regions = {"rois": rois, "sampling_points": (0.5 * torch.rand(2, 5, 4, 2) + 0.25,)}
    config.loss.coverage = 0.0  # few regions cannot explain a whole map
    perfect = SparseFormerOutput(
        last_hidden_state=torch.cat([-latents[:, :1], latents], dim=1), pooler_output=2 * target.embedding, **regions
    )
    losses = task.losses(perfect, target)
    assert losses.keys() == {"embedding", "tokens", "roi_hinge", "point_hinge"}
    torch.testing.assert_close(torch.stack([*losses.values()]), torch.zeros(4, 2))
    opposite = SparseFormerOutput(
        last_hidden_state=-perfect.last_hidden_state, pooler_output=-perfect.pooler_output, **regions
    )
    config.loss.embedding, config.loss.tokens = 3.0, 0.25
    torch.testing.assert_close(task.total(task.losses(opposite, target)), torch.tensor(3.0 * 2 + 0.25 * 2))


def test_epochs_become_steps(run_file):
    config = read(run_file)
    del config.train["max_steps"]
    config.train["num_train_epochs"] = 2
    trainer = make_trainer(config)
    assert trainer.args.max_steps == round(2 * 11 / 4)
    assert len(trainer.train_dataset) == trainer.args.max_steps * 4


def test_a_timm_teacher_works(run_file, tmp_path):
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    directory = tmp_path / "vit"
    timm.models.save_for_hf(vit, directory, model_config={"model_args": sizes}, safe_serialization=True)
    config = read(run_file, f"teacher.model=local-dir:{directory}", "teacher.source=timm", "train.max_steps=2")
    assert SparseFormerModel.from_pretrained(run_bootstrap(config)).config.projection_size == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.images=/nowhere"], "'/nowhere' does not exist; data.images takes a folder of images"),
        (["data.held_out=14"], "There are 14 images and data.held_out=14"),
        (["data.held_out=1"], "data.held_out must be at least 2, got 1"),
        (["student.overrides.padding_mode=bordr"], "'border', 'zeros'"),
        (["student.overrides.focusing_hidden_act=gellu"], "Did you mean 'gelu'"),
        (["student.trained_cortex_blocks=3"], "has 2 cortex blocks"),
        (["student.trained_cortex_blocks=some"], "student.trained_cortex_blocks=some, but the student has 2"),
        (["student.overrides.num_latent=3"], "Did you mean 'num_latents'"),
        (["student.overrides.hidden_size=64"], "hidden_size follows the teacher"),
        (["teacher.source=openclip"], "Did you mean 'open_clip'"),
        (["data.min_crop_area=0"], "data.min_crop_area must be above 0"),
        (["data.min_crop_are=0.5"], "Did you mean 'min_crop_area'"),
        (["train.learning_rat=1"], "Did you mean 'learning_rate'"),
        (["train.max_steps=0"], "train.max_steps=0"),
        (["train.per_device_train_batch_size=0"], "train.per_device_train_batch_size=0"),
        (["train.gradient_accumulation_steps=0"], "train.gradient_accumulation_steps=0"),
        (["seed=-1"], "seed must be from 0 to 4294967295, got -1"),
        (["--fast"], "Unrecognized arguments: --fast"),
    ],
)
def test_bad_settings_end_with_one_line(run_file, overrides, message, capfd):
    assert main([str(run_file), *overrides]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_files_that_change_during_a_run_are_noticed(run_file, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    config = read(run_file, f"data.images={folder}", "data.held_out=2")
    for name in "abc":
        (folder / f"{name}.png").write_bytes(b"")
    run = RunFolder.open(config, config.output_dir)
    prepare_images(config, run)
    prepare_images(config, run)
    (folder / "d.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"changed since this run began \(3 images then, 4 images now\)"):
        prepare_images(config, run)


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys, sf_mllm.training.bootstrap.__main__ as b\n"
        "try: b.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'omegaconf'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CONFIG.yaml" in done.stdout


def test_a_loss_that_is_no_number_is_named_with_its_step(run_file, monkeypatch):
    losses, calls = BootstrapTask.losses, []

    def spoiled(task, *args):
        calls.append(None)
        found = losses(task, *args)
        return found | {"tokens": found["tokens"] * math.nan} if len(calls) == 2 else found

    monkeypatch.setattr(BootstrapTask, "losses", spoiled)
    config = load_run_config(BootstrapConfig, run_file, ["train.max_steps=6", "train.logging_steps=6"])
    with pytest.raises(InputError, match=r"The loss is nan at step 6, first in step 2 \(tokens\); start a new run"):
        run_bootstrap(config)


@pytest.mark.parametrize("part", ["embedding", "feature_map"])
def test_a_teacher_that_fails_is_named(run_file, monkeypatch, part):
    targets, calls = BootstrapTask.targets, []

    def spoiled(task, *args):
        calls.append(None)
        found = targets(task, *args)
        if len(calls) == 2:
            getattr(found, part)[0, 0] = math.nan
        return found

    monkeypatch.setattr(BootstrapTask, "targets", spoiled)
    config = load_run_config(BootstrapConfig, run_file, ["train.max_steps=6", "train.logging_steps=6"])
    message = r"nan at step 6, because the teacher's own output is no number in step 2; .* train\.torch_compile=false"
    with pytest.raises(InputError, match=message):
        run_bootstrap(config)
