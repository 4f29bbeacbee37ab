"""What a run can be asked beyond its defaults: other losses, sizes of its crops, kernels, what trains."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from sf_mllm.config import load_run_config
from sf_mllm.data.augment import parse_resolutions, resolution_of_step
from sf_mllm.encoder.cortex import Attention
from sf_mllm.encoder.mixing import AdaptiveMixing
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.stem import StemConvolution
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.losses import average_in_rois
from sf_mllm.training.bootstrap.run import run_bootstrap
from sf_mllm.training.bootstrap.student import build_student
from sf_mllm.training.bootstrap.teachers import load_teacher
from tests.training.killed_runs import run_until_killed_at_step_5
from tests.training.test_bootstrap import gradients_of_one_step, make_trainer

EVERYTHING = ["loss.attraction=3", "loss.size_hinge=2", "student.trained_cortex_blocks=all", "student.train_head=true"]


def read(run_file, *overrides):
    return load_run_config(BootstrapConfig, run_file, overrides)


def test_a_run_with_everything_trains_all_of_it_and_saves_the_encoder_alone(run_file):
    config = read(run_file, *EVERYTHING, "train.max_steps=3", "train.logging_steps=1")
    encoder = run_bootstrap(config)
    student, _ = build_student(config, load_teacher(config.teacher))
    saved = load_file(encoder / "model.safetensors")
    assert saved.keys() == student.state_dict().keys()
    assert SparseFormerModel.from_pretrained(encoder).config.architectures == ["SparseFormerModel"]
    checkpoint = load_file(encoder.parent / "checkpoints/checkpoint-3/model.safetensors")
    assert checkpoint.keys() == saved.keys()
    rows = [json.loads(line) for line in (encoder.parent / "metrics.jsonl").read_text().splitlines()]
    weights = {"embedding": 1, "tokens": 1, "coverage": 1, "attraction": 3}
    weights |= {"roi_hinge": 0.5, "size_hinge": 2, "point_hinge": 10}
    assert {name for name in rows[0] if name.startswith("loss_")} == {f"loss_{name}" for name in weights}
    parts = sum(weight * rows[0][f"loss_{name}"] for name, weight in weights.items())
    assert rows[0]["loss"] == pytest.approx(parts, rel=1e-4)


def test_with_everything_a_killed_run_ends_as_an_undisturbed_one(run_file, tmp_path):
    undisturbed = run_bootstrap(read(run_file, *EVERYTHING, f"output_dir={tmp_path / 'a'}"))
    overrides = [*EVERYTHING, f"output_dir={tmp_path / 'b'}"]
    assert run_until_killed_at_step_5(str(run_file), *overrides) == -signal.SIGKILL
    resumed = run_bootstrap(read(run_file, *overrides))
    for path in ("encoder/model.safetensors", "checkpoints/checkpoint-8/model.safetensors"):
        ours, theirs = (load_file(folder.parent / path) for folder in (resumed, undisturbed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_with_everything_student_and_teacher_are_compiled_once_each(run_file, tmp_path):
    """Evaluations between the steps, whose batches have another size, compile nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = [*EVERYTHING, "train.max_steps=4", "train.per_device_eval_batch_size=2", "train.eval_steps=2"]
    compiled = [f"output_dir={tmp_path / 'b'}", "train.torch_compile=true", "train.torch_compile_backend=aot_eager"]
    eager = run_bootstrap(read(run_file, *settings))
    assert not torch._dynamo.utils.counters["stats"]
    encoder = run_bootstrap(read(run_file, *settings, *compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (encoder, eager))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)
    torch._dynamo.reset()


def test_each_resolution_is_compiled_for_itself(run_file, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = ["data.resolutions=[16,24,32,40]", "train.max_steps=8", "train.torch_compile=true"]
    config = read(run_file, *settings, f"output_dir={tmp_path / 'b'}", "train.torch_compile_backend=eager")
    resolutions = parse_resolutions([16, 24, 32, 40])
    seen = {resolution_of_step(resolutions, config.seed, step) for step in range(8)}
    assert len(seen) >= 3  # of two the second could be one for all sizes
    run_bootstrap(config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(seen) + 1  # and the teacher
    torch._dynamo.reset()


def test_with_everything_accumulation_equals_a_larger_batch(run_file):
    at_once, accumulated = (gradients_of_one_step(run_file, *shares, *EVERYTHING) for shares in ((4, 1), (2, 2)))
    for name in ("cortex.0.mlp.fc1.weight", "stem.conv.weight"):
        assert at_once[name].abs().max() > 1e-4
    torch.testing.assert_close(accumulated, at_once, atol=1e-6, rtol=1e-4)


def test_kernels_reach_student_and_losses(run_file):
    config = read(run_file, "student.kernels=triton")
    trainer = make_trainer(config)
    parts = [
        module for module in trainer.model.modules() if isinstance(module, StemConvolution | AdaptiveMixing | Attention)
    ]
    assert {type(part) for part in parts} == {StemConvolution, AdaptiveMixing, Attention}
    assert trainer.task.kernels == "triton" and {part.kernels for part in parts} == {"triton"}
    with pytest.raises(InputError, match="'triton' need a CUDA device"):  # the losses say so, too
        average_in_rois(torch.randn(1, 2, 4, 4), torch.rand(1, 3, 4), kernels="triton")
    with pytest.raises(InputError, match="'triton' need a CUDA device"):
        run_bootstrap(config)
    with pytest.raises(InputError, match=r"'tritn' are unknown\. Did you mean 'triton'"):
        make_trainer(read(run_file, "student.kernels=tritn"))
    trainer = make_trainer(read(run_file))  # by itself
    assert trainer.task.kernels == trainer.model.kernels == "torch"


def test_all_blocks_and_the_head_train_on_request(run_file):
    overrides = ["student.trained_cortex_blocks=all", "student.train_head=true", "train.max_steps=2"]
    config = read(run_file, *overrides)
    before = {
        name: tensor.clone()
        for name, tensor in build_student(config, load_teacher(config.teacher))[0].state_dict().items()
    }
    after = load_file(run_bootstrap(config) / "model.safetensors")
    assert [name for name, tensor in after.items() if torch.equal(tensor, before[name])] == []
