import pytest
import torch
from transformers import TrainingArguments

from sf_mllm.training.arguments import make_training_arguments


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiling_does_not_round_the_products_that_predict_coordinates(tmp_path):
    make_training_arguments({"max_steps": 1, "torch_compile": True, "bf16": True}, tmp_path, seed=0)
    a, b = torch.randn(2, 512, 512, device="cuda")
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0, atol=1e-3)


def test_uploads_wait_for_nothing_where_there_is_a_gpu(tmp_path):
    assert make_training_arguments({"max_steps": 1}, tmp_path, seed=0).accelerator_config.non_blocking == (
        torch.cuda.is_available()
    )
    own = {"max_steps": 1, "accelerator_config": {"non_blocking": True}}
    assert make_training_arguments(own, tmp_path, seed=0).accelerator_config.non_blocking


def test_one_process_uses_one_gpu(tmp_path, monkeypatch, caplog):
    """On a machine with several, transformers would take them all."""
    finish = TrainingArguments.__post_init__

    def find_four_gpus(arguments):
        finish(arguments)
        arguments._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", find_four_gpus)
    arguments = make_training_arguments({"max_steps": 1, "per_device_train_batch_size": 8}, tmp_path, seed=0)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
    assert "Using one of 4 GPUs; start with torchrun --nproc_per_node 4" in caplog.text
