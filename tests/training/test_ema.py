"""The average of the weights: its values, and that runs measure and save it; for resuming see the variants."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sf_mllm.config import load_run_config
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.ema import WeightAverage
from sf_mllm.training.bootstrap.run import run_bootstrap
from sf_mllm.training.bootstrap.student import build_student
from sf_mllm.training.bootstrap.teachers import load_teacher


def step(average, number):
    average.on_step_end(None, SimpleNamespace(global_step=number), None)


def test_the_average_by_hand():
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.25)
    nn.init.zeros_(module.weight)
    average.on_train_begin(None, SimpleNamespace(global_step=0), None)
    nn.init.constant_(module.weight, 11.0)
    step(average, 1)  # decay (1 + 1) / (10 + 1): 9 / 11 of the way
    with average.in_place():
        torch.testing.assert_close(module.weight, torch.full((1, 2), 9.0))
    nn.init.constant_(module.weight, 1.0)
    step(average, 10)  # (1 + 10) / (10 + 10) is more than 0.25
    with average.in_place():
        torch.testing.assert_close(module.weight, torch.full((1, 2), 0.25 * 9 + 0.75 * 1))


def test_the_trained_weights_come_back_after_an_error_too():
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, decay=0.9)
    average.on_train_begin(None, SimpleNamespace(global_step=0), None)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    trained = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert not torch.equal(module.weight, trained["weight"]) and torch.equal(module.bias, trained["bias"])
        raise ZeroDivisionError
    torch.testing.assert_close(module.state_dict(), trained, rtol=0, atol=0)
    assert module.weight.requires_grad and module.weight.is_leaf


def test_another_set_of_parameters_is_refused(tmp_path):
    module = nn.Linear(3, 3)
    average = WeightAverage(module, decay=0.9)
    args = SimpleNamespace(output_dir=str(tmp_path))
    average.on_train_begin(args, SimpleNamespace(global_step=0), None)
    (tmp_path / "checkpoint-2").mkdir()
    average.save(tmp_path / "checkpoint-2")
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="other parameters"):
        average.on_train_begin(args, SimpleNamespace(global_step=2), None)


def test_a_run_measures_and_saves_the_average(run_file, tmp_path):
    """Against one with the same seed that saves each step's weights: the average is theirs."""
    every_step = ["train.save_steps=1", "train.save_total_limit=9", f"output_dir={tmp_path / 'plain'}"]
    plain = run_bootstrap(load_run_config(BootstrapConfig, run_file, every_step)).parent
    run = run_bootstrap(load_run_config(BootstrapConfig, run_file, ["ema_decay=0.6"])).parent

    steps = [load_file(plain / f"checkpoints/checkpoint-{number}/model.safetensors") for number in range(1, 9)]
    torch.testing.assert_close(  # the training itself is not touched
        load_file(run / "checkpoints/checkpoint-8/model.safetensors"), steps[-1], rtol=0, atol=0
    )
    averages = load_file(run / "checkpoints/checkpoint-8/ema.safetensors")
    final = load_file(run / "encoder/model.safetensors")
    start = start_of(run_file)
    for name, found in final.items():
        expected = start[name]
        for number, weights in enumerate(steps, start=1):
            decay = min(0.6, (1 + number) / (10 + number))
            expected = decay * expected + (1 - decay) * weights[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        if name in averages:
            assert torch.equal(found, averages[name])
        else:
            assert torch.equal(found, steps[-1][name])  # frozen
    averaged, trained = (agreements_of(folder) for folder in (run, plain))
    assert len(averaged) == len(trained) == 2 and averaged[-1] != trained[-1]
    measured = json.loads((run / "run.json").read_text())["evaluation"]["eval_embedding_cosine"]
    assert measured == averaged[-1]


def agreements_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_embedding_cosine"] for row in rows if "eval_embedding_cosine" in row]


def start_of(run_file):
    config = load_run_config(BootstrapConfig, run_file)
    return build_student(config, load_teacher(config.teacher))[0].state_dict()
