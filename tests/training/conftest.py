import json
import os

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
}
STUDENT = {
    "num_latents": 5,
    "num_hidden_layers": 2,
    "stem_channels": 8,
    "focusing_size": 16,
    "focusing_num_attention_heads": 2,
    "focusing_repeats": 2,
    "num_sampling_points": 4,
    "focusing_mixing_size": 8,
    "sampling_mixing_size": 8,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory):
    """A tiny random CLIP that plain open_clip loads by its local-dir: scheme."""
    directory = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip = open_clip.CLIP(**CLIP_CONFIG)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, directory / "open_clip_model.safetensors")
    settings = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}}
    (directory / "open_clip_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Fourteen images of different sizes, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    rng = np.random.default_rng(0)
    for index in range(14):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        name = f"sub/{index}.png" if index >= 12 else f"{index}.png"
        small.resize((40 + index, 36), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture
def run_file(tmp_path, clip_directory, image_folder):
    """Path of the YAML of a tiny run: 8 steps of 4 images, a checkpoint every 3."""
    import yaml

    values = {
        "output_dir": str(tmp_path / "run"),
        "teacher": {"model": f"local-dir:{clip_directory}"},
        "student": {"overrides": STUDENT},
        "data": {"images": str(image_folder), "resolution": 40, "held_out": 3},
        "inherited_learning_rate": 1e-3,
        "train": {
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "logging_steps": 2,
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "bf16": False,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    os.environ.pop("RANK", None)
    return path


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Encoder, decoder and conversations of a tiny run of stage two."""
    from tests.training.tiny_instruct import save_parts

    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


@pytest.fixture
def kill_after_step(monkeypatch):
    """A function that makes every run of stage two from now on die after a step; after None, none."""
    from sf_mllm.training.instruct import run as instruct_run
    from tests.training.tiny_instruct import KillAfterStep

    original = instruct_run.report_progress

    def kill(step):
        def report_and_kill(trainer, run):
            original(trainer, run)
            if step is not None:
                trainer.add_callback(KillAfterStep(step))

        monkeypatch.setattr(instruct_run, "report_progress", report_and_kill)

    return kill
