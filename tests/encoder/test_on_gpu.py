"""The encoder on a CUDA device: the stored official tensors, reduced precision, compilation."""

import copy

import pytest
import torch

from sf_mllm import load_official_checkpoint
from tests.encoder.official_fixtures import NAMES, read_fixture
from tests.encoder.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", NAMES)
def test_official_tensors(name: str) -> None:
    state, tensors, official_config = read_fixture(name)
    model = load_official_checkpoint(state, official_config=official_config).cuda()
    with torch.no_grad():
        output = model(tensors["input"].cuda())
    for ours, theirs in (
        (output.pooler_output, "output"),
        (output.last_hidden_state, "tokens.norm"),
        (output.rois[:, -1], "rois.final"),
    ):
        torch.testing.assert_close(ours.cpu(), tensors[theirs], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_and_backward(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).cuda()
    images = torch.randn(2, 3, 48, 32, device="cuda")
    reference = model(images)
    with torch.autocast("cuda", dtype=dtype):
        output = model(images)
    assert output.rois.dtype == torch.float32
    scale = reference.pooler_output.abs().max()
    assert (output.pooler_output.float() - reference.pooler_output).abs().max() < 0.05 * scale
    (output.pooler_output.float().square().mean() + output.rois.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
def test_bf16_model(family: str) -> None:
    model = tiny_model(family).cuda()
    images = torch.randn(2, 3, 48, 32, device="cuda")
    with torch.no_grad():
        reference = model(images)
        output = copy.deepcopy(model).to(torch.bfloat16)(images)
    assert output.rois.dtype == torch.float32 and output.last_hidden_state.dtype == torch.bfloat16
    scale = reference.pooler_output.abs().max()
    assert (output.pooler_output.float() - reference.pooler_output).abs().max() < 0.1 * scale


def test_compiled_equals_eager() -> None:
    model = tiny_model().cuda()
    images = torch.randn(2, 3, 48, 32, device="cuda")
    with torch.no_grad():
        eager, compiled = model(images), torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(compiled.last_hidden_state, eager.last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled.rois, eager.rois, rtol=0, atol=1e-5)
