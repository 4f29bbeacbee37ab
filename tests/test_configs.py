from pathlib import Path

import pytest
import torch

from sf_mllm.config import load_run_config
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.student import build_student
from sf_mllm.training.bootstrap.teachers import load_teacher

CONFIGS = Path(__file__).parents[1] / "configs"
BOOTSTRAP = sorted((CONFIGS / "bootstrap").rglob("*.yaml"))
FULL_SIZE = {
    "openai_vit_b16": "sparseformer_btsp_openai_clip_base",
    "openai_vit_l14": "sparseformer_btsp_openai_clip_large",
}


def test_every_bootstrap_config_is_covered():
    assert [path.stem for path in BOOTSTRAP] == ["demo", "demo_classifier", "demo_model", *FULL_SIZE]


@pytest.mark.parametrize("path", BOOTSTRAP, ids=lambda path: path.stem)
def test_bootstrap_config_parses(path, tmp_path):
    # TrainingArguments switches compilation on by environment variables, for the whole process.
    overrides = [
        "data.images=somewhere",
        "teacher.model=some-model",
        "evaluation.zero_shot=tasks",
        "train.torch_compile=false",
    ]
    config = load_run_config(BootstrapConfig, path, overrides)
    arguments = make_training_arguments(config.train, tmp_path, config.seed)
    assert arguments.learning_rate > config.inherited_learning_rate > 0
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize(("name", "published"), FULL_SIZE.items())
def test_full_size_bootstrap_builds_the_published_architecture(name, published):
    """With random weights on the meta device."""
    overrides = ["data.images=somewhere", "teacher.pretrained=null", "teacher.allow_random=true"]
    config = load_run_config(BootstrapConfig, CONFIGS / "bootstrap" / f"{name}.yaml", overrides)
    with torch.device("meta"):
        teacher = load_teacher(config.teacher)
        student, _ = build_student(config, teacher)
    expected = SparseFormerConfig.from_name(published, initial_roi_layout=student.config.initial_roi_layout)
    assert student.config.to_diff_dict() == expected.to_diff_dict() | {
        key: value for key, value in student.config.to_diff_dict().items() if key in ("architectures", "dtype")
    }
    assert all(parameter.is_meta for parameter in student.parameters())
    trained = {name.split(".")[1] for name, p in student.cortex.named_parameters(prefix="cortex") if p.requires_grad}
    assert len(trained) == len(student.cortex) // 2  # teacher blocks from N/3 to 2N/3 of the last 2N/3


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_bootstrap_asks_for_images(name):
    with pytest.raises(InputError, match=r"data\.images"):
        load_run_config(BootstrapConfig, CONFIGS / "bootstrap" / f"{name}.yaml")
