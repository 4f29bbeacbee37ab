"""The same command on two processes, with gloo on the CPU: DDP and DeepSpeed ZeRO-2 end as one process does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.version import Version
from safetensors.torch import load_file

from sf_mllm.config import load_run_config
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.run import run_bootstrap
from sf_mllm.training.bootstrap.teachers import load_teacher
from sf_mllm.training.processes import check_processes, check_strategy
from sf_mllm.training.run_folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")

DDP_RESUMES_ON_CPUS = Version(transformers.__version__) >= Version("5.23")
"""The Trainer of 5.17 looks for a device "cpu:0" when it loads an optimizer; on GPUs it resumes."""

ENTRY_POINT = """
import gc, os, signal, sys
gc.set_threshold(200_000)  # imports are most of a run's time, and collecting garbage is two fifths of theirs
from sf_mllm.training.bootstrap.__main__ import main
from sf_mllm.training.processes import end_process
from sf_mllm.training.progress import ProgressReporter

def kill(self, args, state, control, **kwargs):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["KILL_AT_STEP_5"] == "yes":
    ProgressReporter.on_step_end = kill
end_process(main(sys.argv[1:]))
"""

LEAVING = """
import atexit, os, sys
from accelerate import PartialState
from sf_mllm.training.processes import end_process

class Watched:
    def __del__(self, write=os.write):
        write(1, b"torn down")

watched = Watched()
atexit.register(print, "functions at exit ran")
if sys.argv[1] == "gloo":
    PartialState(cpu=True).destroy_process_group()
end_process(3)
"""


def launch(folder, *arguments, kill=False):
    """Run the entry point on two processes under torchrun."""
    script = folder / "entry_point.py"
    script.write_text(ENTRY_POINT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run([*torchrun, str(script), *arguments], KILL_AT_STEP_5="yes" if kill else "no")


def run(command, **variables):
    environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=CONFIGS.parent
    )


def zero2_in_fp32(folder):
    """The shipped configuration without autocast, for runs on the CPU in fp32."""
    settings = json.loads((CONFIGS / "deepspeed/zero2.json").read_text())
    settings["torch_autocast"]["enabled"] = False
    path = folder / "zero2.json"
    path.write_text(json.dumps(settings))
    return path


def figures_of(folder):
    """Losses and evaluations of a run, by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name == "step" or name.startswith(("loss", "eval"))}
        for row in rows
    ]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_killed_and_resumed_end_as_one_that_was_not_disturbed(run_file, tmp_path, strategy):
    """Both take 8 steps of 8 images in micro-batches of 2; the two processes resume at step 4."""
    settings = ["train.save_steps=4", "train.per_device_train_batch_size=2", "loss.attraction=1"]
    alone = [*settings, f"output_dir={tmp_path / 'one'}", "train.gradient_accumulation_steps=4"]
    one = run_bootstrap(load_run_config(BootstrapConfig, run_file, alone)).parent
    two = tmp_path / "two"
    arguments = [
        str(run_file),
        *settings,
        f"output_dir={two}",
        "train.gradient_accumulation_steps=2",
    ]
    if strategy == "zero2":
        arguments.append(f"train.deepspeed={zero2_in_fp32(tmp_path)}")
    is_killed = strategy == "zero2" or DDP_RESUMES_ON_CPUS
    if is_killed:
        killed = launch(tmp_path, *arguments, kill=True)
        assert killed.returncode != 0 and "SIGKILL" in killed.stderr and not (two / "encoder").exists()
    done = launch(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert ("Resuming at step 4" in done.stderr) == is_killed
    assert done.stderr.count("Saved the encoder") == 1

    record = json.loads((two / "run.json").read_text())
    assert record["outcome"] == "complete" and record["global_batch_size"] == 8
    ours, theirs = load_file(two / "encoder/model.safetensors"), load_file(one / "encoder/model.safetensors")
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    # Sums in another order differ by 1e-7; where a gradient is almost zero Adam makes 5e-5 of that (measured).
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)
    for row, expected in zip(figures_of(two), figures_of(one), strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("connection", ["gloo", "none"])
def test_a_process_connected_by_gloo_ends_without_teardown(connection):
    rendezvous = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run([sys.executable, "-c", LEAVING, connection], **rendezvous)
    assert done.returncode == 3, done.stderr
    assert "functions at exit ran" in done.stdout
    assert ("torn down" in done.stdout) == (connection == "none")


@needs_deepspeed
def test_accelerate_starts_the_shipped_zero2_configuration(run_file, tmp_path):
    """In bf16, as the configuration says: weights stay fp32, autocast rounds what it rounds in one process."""
    settings = ["train.bf16=true", "train.max_steps=3", "train.logging_steps=1", "train.eval_strategy=no"]
    run_bootstrap(load_run_config(BootstrapConfig, run_file, settings))
    two = tmp_path / "two"
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--main_process_port",
        "0",
        "--num_processes",
        "2",
    ]
    accelerate += ["--config_file", str(CONFIGS / "accelerate/zero2_8_gpus.yaml"), "-m", "sf_mllm.training.bootstrap"]
    arguments = [*settings, f"output_dir={two}", "train.per_device_train_batch_size=2"]
    done = run([*accelerate, str(run_file), *arguments])
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype for tensor in load_file(two / "encoder/model.safetensors").values()} == {torch.float32}
    assert figures_of(two) == [
        pytest.approx(row, rel=2e-3, abs=1e-3)
        for row in figures_of(tmp_path / "run")  # measured: 3e-4 relative
    ]


def test_a_random_teacher_is_the_same_in_every_process(run_file):
    """Whatever was drawn before."""
    overrides = ["teacher.model=ViT-S-32-alt", "teacher.allow_random=true"]
    config = load_run_config(BootstrapConfig, run_file, overrides).teacher
    teachers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        teachers.append(load_teacher(config))
        drawn = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(3))  # and nothing changes for what is drawn after
    torch.testing.assert_close(teachers[0].state_dict(), teachers[1].state_dict(), rtol=0, atol=0)


def test_a_run_compiles_student_and_teacher_once_each(run_file, tmp_path):
    """Held-out images come in batches of another size, and training goes on after them; the result is the same."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = ["train.per_device_eval_batch_size=2", "train.eval_steps=2"]
    compiled = [f"output_dir={tmp_path / 'b'}", "train.torch_compile=true", "train.torch_compile_backend=eager"]
    eager = run_bootstrap(load_run_config(BootstrapConfig, run_file, settings))
    assert not torch._dynamo.utils.counters["stats"]
    weights = run_bootstrap(load_run_config(BootstrapConfig, run_file, [*settings, *compiled]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(  # measured: 5e-5, in biases of keys, whose gradients are zero but for rounding
        load_file(weights / "model.safetensors"), load_file(eager / "model.safetensors"), rtol=0, atol=5e-4
    )
    torch._dynamo.reset()


def test_the_accelerate_configurations_are_whole():
    paths = sorted((CONFIGS / "accelerate").glob("*.yaml"))
    assert [path.stem for path in paths] == [
        "ddp_2_machines",
        "ddp_8_gpus",
        "fsdp2_8_gpus",
        "zero2_2_machines",
        "zero2_8_gpus",
        "zero3_8_gpus",
    ]
    for path in paths:
        config = load_config_from_file(str(path))
        assert config.num_processes == 8 * config.num_machines
        values = yaml.safe_load(path.read_text())
        if path.stem.startswith("zero"):
            assert (CONFIGS.parent / values["deepspeed_config"]["deepspeed_config_file"]).is_file()
        assert f"configs/accelerate/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("changes", "bf16", "message"),
    [
        ({}, True, None),
        ({}, False, "train.bf16=false, but the DeepSpeed configuration's torch_autocast computes in bfloat16"),
        ({"torch_autocast": {"enabled": False}}, False, None),
        ({"torch_autocast": {"enabled": False}}, True, "train.bf16=true, but .* computes in float32"),
        ({"bf16": {"enabled": True}}, True, "rounds the weights themselves"),
        ({"fp16": {"enabled": True}}, False, "rounds the weights themselves"),
        ({"zero_optimization": {"stage": 3}}, True, "ZeRO-3 cannot train an encoder"),
    ],
)
def test_a_deepspeed_configuration_must_train_as_one_process_does(changes, bf16, message):
    settings = json.loads((CONFIGS / "deepspeed/zero2.json").read_text()) | changes
    arguments = SimpleNamespace(bf16=bf16, deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    if message is None:
        check_strategy(arguments, may_split_weights=False)
    else:
        with pytest.raises(InputError, match=message):
            check_strategy(arguments, may_split_weights=False)


def test_fsdp_cannot_train_an_encoder(monkeypatch):
    arguments = SimpleNamespace(bf16=True, deepspeed_plugin=None, fsdp=None, world_size=2)
    check_strategy(arguments, may_split_weights=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP cannot train an encoder"):
        check_strategy(arguments, may_split_weights=False)
    check_strategy(arguments, may_split_weights=True)


@pytest.mark.parametrize("strategy", ["DDP", "ZeRO-2"])
def test_a_run_goes_on_with_the_processes_that_began_it(tmp_path, strategy):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()

    def arguments(processes):
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}})
        return SimpleNamespace(
            world_size=processes,
            train_batch_size=3,
            gradient_accumulation_steps=2,
            fsdp=None,
            deepspeed_plugin=plugin if strategy == "ZeRO-2" else None,
        )

    check_processes(run, arguments(2))
    check_processes(run, arguments(4))  # nothing was trained yet
    assert run.record == {"processes": 4, "strategy": strategy}
    (run.checkpoints / "checkpoint-1").mkdir()
    (run.checkpoints / "checkpoint-1/trainer_state.json").write_text('{"global_step": 1}')
    check_processes(run, arguments(4))
    message = rf"4 processes \({strategy}\), which take 24 rows a step, and this start has 2 .* take 12; start 4 proc"
    with pytest.raises(InputError, match=message):
        check_processes(run, arguments(2))
    run.update_record(strategy="FSDP")
    with pytest.raises(InputError, match=rf"4 processes \(FSDP\).* this start has 4 \({strategy}\)"):
        check_processes(run, arguments(4))
