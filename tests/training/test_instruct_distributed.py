"""Stage two on two processes with gloo on the CPU: DDP, ZeRO-2, ZeRO-3 and FSDP end as one process does.

A tenth of the rows is text only, and each process takes one row at a time, twice a step. The longest row is text only:
grouped by length, it is the last one of its step, in which gradients are exchanged, and the other process has an image.
"""

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
from accelerate import FullyShardedDataParallelPlugin
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn

from sf_mllm.config import load_run_config
from sf_mllm.errors import InputError
from sf_mllm.training.instruct import run as instruct_run
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.split_weights import gather_trained_weights, has_split_weights, prepare_fsdp
from sf_mllm.training.processes import check_strategy
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_encoder, make_image, make_image_processor

ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
needs_resume = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason='the Trainer of 5.17 looks for a device "cpu:0" when it loads an optimizer; on GPUs it resumes',
)

ENTRY_POINT = """
import gc, os, signal, sys
gc.set_threshold(200_000)  # imports are most of a run's time, and collecting garbage is two fifths of theirs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from sf_mllm.training.instruct.__main__ import main
from sf_mllm.training.processes import end_process
from sf_mllm.training.progress import ProgressReporter

def kill(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

def start(self, *args, fsdp_plugin=None, original=AcceleratorState.__init__, **kwargs):
    # accelerate leaves FSDP out on CPUs, where torch has it.
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

AcceleratorState.__init__ = start
if os.environ["KILL_AT_STEP_3"] == "yes":
    ProgressReporter.on_step_end = kill
end_process(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """The YAML of a run of 5 steps of 4 rows: 18 rows with images, of which some have two, and 2 of text only."""
    folder = tmp_path_factory.mktemp("parts")
    make_encoder().save_pretrained(folder / "encoder")
    make_image_processor().save_pretrained(folder / "encoder")
    tokenizer = make_tokenizer()
    make_decoder(vocab_size=len(tokenizer), tied=True).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    rows = []
    for index in range(24):
        make_image(index).save(folder / f"{index}.png")
        images = [] if index % 10 == 3 else [f"{index}.png"] * (1 + index % 2)
        human = "<image>" * len(images) + "\nWhat colour is the square?"
        answer = f"{index} green " * (20 if index == 3 else 1 + index % 4)
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        rows.append({"id": index, "conversations": turns} | ({"image": images} if images else {}))
    (folder / "rows.json").write_text(json.dumps(rows))
    values = {
        "output_dir": str(folder / "run"),
        "encoder": str(folder / "encoder"),
        "decoder": str(folder / "decoder"),
        "projector_learning_rate": 1e-3,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "data": {"conversations": str(folder / "rows.json"), "held_out": 4, "max_length": 200, "seed": 1},
        "save": {"dtype": "float32"},
        "train": {
            "max_steps": 5,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "group_by_length",
            "gradient_checkpointing": True,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def one_process(run_file, tmp_path_factory):
    """The folder of the run in one process, which accumulates what two processes share out."""
    folder = tmp_path_factory.mktemp("one")
    made = []

    class Watched(instruct_run.InstructTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            made.append(self)

    settings = [f"output_dir={folder}", "train.gradient_accumulation_steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruct_run, "InstructTrainer", Watched)
        instruct_run.run_instruct(load_run_config(InstructConfig, run_file, settings))
    (trainer,) = made
    for dataset, has_text in ((trainer.train_dataset, 2), (trainer.eval_dataset, 1)):
        assert sum(row["pixel_values"] is None for row in dataset) == has_text
    *_, last_but_one, last = trainer.train_dataset.lengths.argsort()
    images = [trainer.train_dataset[row]["pixel_values"] for row in (last_but_one, last)]
    assert images[0] is not None and images[1] is None
    return folder


def launch(folder, launcher, *arguments, kill=False):
    """Run the entry point on two processes."""
    script = folder / "entry_point.py"
    script.write_text(ENTRY_POINT)
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,  # a process that waits for another one, which has gone another way, waits for ever
        cwd=ROOT,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "KILL_AT_STEP_3": "yes" if kill else "no",
        },
    )


def how_to_launch(strategy, folder):
    """Return the launcher and its overrides; the shipped configurations, in fp32."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if strategy == "fsdp":
        config = str(ROOT / "configs/accelerate/fsdp2_8_gpus.yaml")
        accelerate = ["accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
        return [*accelerate, "--main_process_port", "0"], []
    if strategy == "ddp":
        return torchrun, []
    settings = json.loads((ROOT / f"configs/deepspeed/{strategy}.json").read_text())
    settings["torch_autocast"]["enabled"] = False
    if strategy == "zero3":  # else a model as small as this one is gathered once and kept
        settings["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    return torchrun, [f"train.deepspeed={folder / 'deepspeed.json'}"]


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


NEEDS = {"ddp": needs_resume, "zero2": needs_deepspeed, "zero3": needs_deepspeed, "fsdp": needs_resume}


@pytest.mark.parametrize("strategy", [pytest.param(strategy, marks=needs) for strategy, needs in NEEDS.items()])
def test_two_processes_killed_and_resumed_end_as_one_that_was_not_disturbed(run_file, one_process, strategy, tmp_path):
    two = tmp_path / "two"
    launcher, settings = how_to_launch(strategy, tmp_path)
    arguments = [str(run_file), f"output_dir={two}", *settings]
    killed = launch(tmp_path, launcher, *arguments, kill=True)
    assert killed.returncode != 0 and "step 2/5" in killed.stderr and not (two / "model").exists(), killed.stderr
    if strategy == "ddp":
        with pytest.raises(InputError, match=r"2 processes \(DDP\), which take 4 rows a step, and this start has 1 "):
            instruct_run.run_instruct(load_run_config(InstructConfig, run_file, [f"output_dir={two}"]))
    done = launch(tmp_path, launcher, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Resuming at step 2 of 5" in done.stderr and done.stderr.count("Saved the model") == 1

    # Sums in another order: measured 2e-7 relative in losses; where a gradient is almost zero Adam makes 1.4e-5 of it,
    # for each strategy in the same weight. Training moves weights by 1e-2.
    assert losses_of(two) == pytest.approx(losses_of(one_process), rel=1e-5)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        torch.testing.assert_close(load_file(two / file), load_file(one_process / file), rtol=0, atol=2e-4)
    record = json.loads((two / "run.json").read_text())
    assert record["processes"] == 2 and record["global_batch_size"] == 4
    held_out_loss = json.loads((one_process / "run.json").read_text())["held_out_loss"]
    assert record["held_out_loss"] == pytest.approx(held_out_loss, rel=1e-5)


@needs_resume
def test_fsdp_computes_in_bf16_what_one_process_does(run_file, tmp_path):
    """Under autocast; with none, the first loss is 4e-4 away."""
    settings = ["dtype=bfloat16", "train.bf16=true", "train.max_steps=1", "train.save_strategy=no"]
    one = [f"output_dir={tmp_path / 'one'}", "train.gradient_accumulation_steps=4"]
    instruct_run.run_instruct(load_run_config(InstructConfig, run_file, [*settings, *one]))
    launcher, _ = how_to_launch("fsdp", tmp_path)
    done = launch(tmp_path, launcher, str(run_file), *settings, f"output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_zero3_may_train_a_decoder_but_not_an_encoder():
    settings = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    arguments = SimpleNamespace(bf16=True, deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    check_strategy(arguments, may_split_weights=True)
    with pytest.raises(InputError, match="ZeRO-3 cannot train an encoder"):
        check_strategy(arguments, may_split_weights=False)
    settings["bf16"] = {"enabled": True}
    with pytest.raises(InputError, match=r"rounds the weights themselves .* take configs/deepspeed/zero3\.json"):
        check_strategy(arguments, may_split_weights=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version: 1 cannot be used; set fsdp_version: 2"),
        ({"state_dict_type": "FULL_STATE_DICT"}, "fsdp_state_dict_type: FULL_STATE_DICT cannot be used; set SHARDED"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: true cannot be used; set false"),
    ],
)
def test_fsdp_settings_that_would_fail_later_are_refused(settings, message):
    usable = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
    with pytest.raises(InputError, match=message):
        prepare_fsdp(FullyShardedDataParallelPlugin(**usable | settings), nn.Identity())


def test_weights_that_are_not_split_are_gathered_as_copies():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    assert not has_split_weights(model)
    gathered = gather_trained_weights(model)
    assert gathered.keys() == {"weight"} and torch.equal(gathered["weight"], model.weight)
    gathered["weight"].zero_()
    assert model.weight.abs().sum() > 0
