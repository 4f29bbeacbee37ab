"""The Triton kernels agree with PyTorch's own operations: interpreted on a CPU, compiled on a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.ops import kernels as kernels_module
from sf_mllm.ops.attention import ATTENTION_IMPLEMENTATIONS, attend
from sf_mllm.ops.convolution import CONVOLUTION_IMPLEMENTATIONS, convolve
from sf_mllm.ops.float8 import FLOAT8_IMPLEMENTATIONS, multiply_and_activate
from sf_mllm.ops.kernels import KERNEL_NAMES, choose_kernels, load_kernels
from sf_mllm.ops.linear_activation import LINEAR_ACTIVATION_IMPLEMENTATIONS, linear_activation
from sf_mllm.ops.mixing import MIXING_IMPLEMENTATIONS, sample_and_mix
from sf_mllm.ops.pooling import POOLING_IMPLEMENTATIONS, pool_and_normalise
from sf_mllm.ops.sampling import SAMPLING_IMPLEMENTATIONS, sample_points
from sf_mllm.ops.stem import STEM_IMPLEMENTATIONS, apply_stem
from tests.ops import (
    attention_cases,
    convolution_cases,
    float8_cases,
    linear_activation_cases,
    mixing_cases,
    pooling_cases,
    sampling_cases,
    stem_cases,
)

pytest.importorskip("triton")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IMPLEMENTATIONS = (
    CONVOLUTION_IMPLEMENTATIONS,
    POOLING_IMPLEMENTATIONS,
    STEM_IMPLEMENTATIONS,
    SAMPLING_IMPLEMENTATIONS,
    MIXING_IMPLEMENTATIONS,
    ATTENTION_IMPLEMENTATIONS,
    LINEAR_ACTIVATION_IMPLEMENTATIONS,
    FLOAT8_IMPLEMENTATIONS,
)
SMALL = {
    "num_latents": 9,
    "focusing_num_attention_heads": 2,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}


def make_model() -> SparseFormerModel:
    torch.manual_seed(0)
    return SparseFormerModel(SparseFormerConfig(focusing_size=64, projection_size=16, **SMALL))


@pytest.mark.parametrize(
    ("cases", "count", "traced"),
    [
        ("sampling_cases", 72, 18),
        ("pooling_cases", 10, 4),
        ("stem_cases", 6, 6),
        ("mixing_cases", 24, 8),
        ("attention_cases", 14, 14),
        ("convolution_cases", 8, 8),
        ("linear_activation_cases", 12, 12),
        ("float8_cases", 9, 9),
    ],
)
def test_interpreted_kernels_agree_with_pytorch(cases: str, count: int, traced: int) -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets.

    Where there are many cases only some are traced, too: the interpreter is slow.
    """
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"  # the interpreter is Python
    script = [sys.executable, str(root / "tests" / "ops" / f"{cases}.py"), "cpu"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{count} cases agree" in done.stdout and f"{traced} traced cases agree" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_kernels_is_one_graph_for_the_compiler(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended device: values need a GPU, shapes and Python do not."""
    torch._dynamo.reset()
    model = make_model().to(dtype)
    model.set_kernels("triton")
    monkeypatch.setattr("sf_mllm.ops.linear_activation_triton._FEWEST_TILES", 0)
    monkeypatch.setattr("sf_mllm.ops.stem_triton._FEWEST_PROGRAMS", 0)
    operations: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda")
        images = torch.empty(2, 3, 65, 64, device="cuda", dtype=dtype)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        with torch.inference_mode():
            output = compiled(images)
    assert output.last_hidden_state.shape == (2, 10, 64) and output.pooler_output.shape == (2, 16)
    fused = sum("linear_activation" in operation for operation in operations)
    assert fused == (0 if dtype == torch.float32 else 2 + 4)  # cortex blocks, steps of the focusing transformer
    assert sum("apply_stem" in operation for operation in operations) == (dtype != torch.float32)
    torch._dynamo.reset()


def test_a_convolution_that_is_looked_at_or_wrapped_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    stem, images, fused = make_model().stem, torch.rand(1, 3, 9, 8), []
    expected = stem(images)

    def fuse(*tensors: torch.Tensor) -> torch.Tensor:
        fused.append(tensors)
        return apply_stem(*tensors)

    for known, implementation in ((STEM_IMPLEMENTATIONS, fuse), *((k, k["torch"]) for k in IMPLEMENTATIONS[:2])):
        monkeypatch.setitem(known, "triton", implementation)
    assert torch.equal(stem(images), expected) and not fused  # by the reference
    stem.conv.kernels = "triton"
    assert torch.equal(stem(images), expected) and len(fused) == 1
    seen = []
    hook = stem.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(stem(images), expected) and len(seen) == 1
    hook.remove()
    forward = stem.conv.forward
    stem.conv.forward = lambda pixels: seen.append(pixels) or forward(pixels)
    assert torch.equal(stem(images), expected) and len(seen) == 2
    del stem.conv.forward
    hook = stem.conv.register_full_backward_hook(lambda module, *gradients: seen.append(gradients))
    stem(images.requires_grad_()).sum().backward()
    assert len(seen) == 3
    hook.remove()
    torch.nn.utils.parametrize.register_parametrization(stem.conv, "weight", torch.nn.Identity())
    assert torch.equal(stem(images), expected) and len(fused) == 1


def test_a_cpu_is_refused_in_plain_words() -> None:
    model = make_model()
    model.set_kernels("triton")
    with pytest.raises(InputError, match="'triton' need a CUDA device, but the model is on 'cpu'; use 'torch'"):
        model(torch.zeros(1, 3, 64, 64))
    model.set_kernels("torch")
    model(torch.zeros(1, 3, 64, 64))


def test_all_names_can_be_loaded() -> None:
    for name in KERNEL_NAMES:
        load_kernels(name)
    assert {frozenset(known) for known in IMPLEMENTATIONS} == {frozenset(KERNEL_NAMES)}


def test_the_automatic_choice_goes_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {"cuda:0": (9, 0), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    choices = {name: choose_kernels("auto", torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")}
    assert choices == {"cpu": "torch", "cuda:0": "triton", "cuda:1": "torch"}
    assert choose_kernels("torch", torch.device("cuda:0")) == "torch"
    assert choose_kernels("triton", torch.device("cpu")) == "triton"  # which then says what it needs
    monkeypatch.setattr(kernels_module, "find_spec", lambda name: None)
    assert choose_kernels("auto", torch.device("cuda:0")) == "torch"
    with pytest.raises(InputError, match=r"'auot' are unknown\. Did you mean 'auto'\? Allowed: auto, torch, triton"):
        choose_kernels("auot", torch.device("cpu"))


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"'tritn' are unknown\. Did you mean 'triton'"):
        make_model().set_kernels("tritn")


ON_A_GPU = pytest.mark.parametrize(
    ("cases", "operation", "count"),
    [
        pytest.param(pooling_cases, pool_and_normalise, 15, id="pooling"),
        pytest.param(stem_cases, apply_stem, 12, id="stem"),
        pytest.param(attention_cases, attend, 21, id="attention"),
        pytest.param(convolution_cases, convolve, 12, id="convolution"),
        pytest.param(linear_activation_cases, linear_activation, 24, id="linear_activation"),
        pytest.param(float8_cases, multiply_and_activate, 9, id="float8"),
        pytest.param(sampling_cases, sample_points, 72, id="sampling"),
        pytest.param(mixing_cases, sample_and_mix, 36, id="mixing"),
    ],
)


@pytest.mark.gpu
@on_gpu
@ON_A_GPU
def test_kernels_agree_with_pytorch_on_a_gpu(cases: Any, operation: Any, count: int) -> None:
    load_kernels("triton")
    assert cases.compare("triton", "cuda", operation) == count


@pytest.mark.gpu
@on_gpu
@ON_A_GPU
def test_compiled_kernels_agree_with_pytorch_on_a_gpu(cases: Any, operation: Any, count: int) -> None:
    load_kernels("triton")
    assert cases.compare("triton", "cuda", torch.compile(operation, fullgraph=True)) == count


@pytest.mark.gpu
@on_gpu
def test_a_compiled_model_with_kernels_equals_an_eager_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, images = make_model().cuda(), torch.randn(4, 3, 64, 64, device="cuda")
    expected = model(images).pooler_output
    expected.square().mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.set_kernels("triton")
    compiled = torch.compile(model, fullgraph=True)
    output = compiled(images).pooler_output
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: n + m
            )
