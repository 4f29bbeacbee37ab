"""Stage one with teachers that are no plain CLIP: classifiers, attention pooling, no final norm."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.training.bootstrap.__main__ import main
from sf_mllm.training.bootstrap.config import BootstrapConfig, LossConfig, StudentConfig, TeacherConfig
from sf_mllm.training.bootstrap.losses import classification_loss, embedding_loss
from sf_mllm.training.bootstrap.student import build_student
from sf_mllm.training.bootstrap.task import BootstrapTask
from sf_mllm.training.bootstrap.teachers import TimmTeacher
from tests.training.conftest import STUDENT

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture
def classifier_directory(tmp_path):
    """A tiny classifier that plain timm loads by its local-dir: scheme."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES)
    torch.nn.init.normal_(vit.head.weight)  # so that classes differ
    directory = tmp_path / "classifier"
    directory.mkdir()
    save_file(vit.state_dict(), directory / "model.safetensors")
    settings = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "label_names": ["cat", "dog", "bird"],
        "model_args": SIZES,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32], "num_classes": 3},
    }
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def test_a_classifier_becomes_a_student_that_classifies(run_file, classifier_directory):
    teacher = ["teacher.source=timm", f"teacher.model=local-dir:{classifier_directory}"]
    assert main([str(run_file), *teacher, "train.max_steps=4"]) == 0
    run = run_file.parent / "run"
    student = SparseFormerModel.from_pretrained(run / "encoder")
    assert student.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    assert student.config.projection_bias
    vit = timm.create_model(f"local-dir:{classifier_directory}", pretrained=True)
    assert torch.equal(student.projection.weight, vit.head.weight) and torch.equal(
        student.projection.bias, vit.head.bias
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {"classification": 1, "tokens": 1, "coverage": 1, "roi_hinge": 0.5, "point_hinge": 10}
    parts = sum(weight * rows[0][f"loss_{name}"] for name, weight in weights.items())
    assert rows[0]["loss"] == pytest.approx(parts, rel=1e-4) and "loss_embedding" not in rows[0]
    evaluation = json.loads((run / "run.json").read_text())["evaluation"]
    assert 0 <= evaluation["eval_class_agreement"] <= 1 and -1 <= evaluation["eval_embedding_cosine"] <= 1


@pytest.mark.parametrize(
    ("changes", "head", "asked"),
    [
        ({"global_pool": "map", "class_token": False, "num_classes": 0}, {"norm", "attention_pool"}, "embedding"),
        ({"global_pool": "avg", "num_classes": 5}, {"norm", "projection"}, "classification"),
        ({"final_norm": False, "num_classes": 5}, {"projection"}, "classification"),
    ],
)
def test_what_trains_and_what_it_is_asked(changes, head, asked):
    torch.manual_seed(0)
    teacher = TimmTeacher(timm.create_model("vit_tiny_patch16_224", **SIZES, **changes))
    config = BootstrapConfig(
        teacher=TeacherConfig(model="given"), student=StudentConfig(overrides=STUDENT, trained_cortex_blocks=1)
    )
    student, _ = build_student(config, teacher)
    frozen = {name.split(".")[0] for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"cortex"} | head
    task = BootstrapTask(teacher, LossConfig(classification=3.0, coverage=0.0, point_hinge=0.0))
    batch = {"pixel_values": torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)}
    output = student(task.normalise(batch["pixel_values"]), output_sampling_points=True)
    target = task.targets(batch)
    losses = task.losses(output, target)
    assert set(losses) == {asked, "tokens", "roi_hinge"}
    compare, weight = {"classification": (classification_loss, 3.0), "embedding": (embedding_loss, 1.0)}[asked]
    torch.testing.assert_close(losses[asked], compare(output.pooler_output, target.embedding))
    by_hand = weight * losses[asked].mean() + losses["tokens"].mean() + 0.5 * losses["roi_hinge"].mean()
    torch.testing.assert_close(task.total(losses), by_hand)
    by_hand.backward()
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())
