"""Towers whose blocks multiply in 8 bits."""

import sys

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import CLIPVisionConfig, CLIPVisionModel

from sf_mllm.bench import encoder
from sf_mllm.bench.arguments import parse_arguments
from sf_mllm.bench.conditions import Conditions
from sf_mllm.bench.encoder import measure_encoders
from sf_mllm.bench.images import DISTINCT_IMAGES, Images
from sf_mllm.bench.library_towers import HfTokens, TimmTokens
from sf_mllm.bench.precision import check_support, prepare_variant
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.towers import find_tower
from sf_mllm.encoder.float8 import Float8Linear
from sf_mllm.errors import InputError

CPU = torch.device("cpu")
CONDITIONS = Conditions(CPU, Images(), repeats=3, seconds=5)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao")


def quantised_layers(module):
    return {
        name
        for name, part in module.named_modules()
        if isinstance(part, Float8Linear)
        or (isinstance(part, nn.Linear) and is_traceable_wrapper_subclass(part.weight))
    }


def linear_layers(module):
    return {name for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def quantise(module, precision="int8", side=64):
    pixels = torch.randn(2, 3, side, side) if precision == "float8" else None
    return prepare_variant(module, precision, "eager", CPU, calibration=pixels)


@pytest.fixture
def float8_on_a_cpu(monkeypatch):
    """A CPU multiplies in float8, too, slowly; users are refused it."""
    for module in ("bench.precision", "encoder.quantization"):
        monkeypatch.setattr(f"sf_mllm.{module}.check_quantization", lambda name, device: None)


def measure(*names, precisions, device=CONDITIONS, modes=("eager",)):
    return list(measure_encoders(names, device, sizes=[None], batches=[1], precisions=precisions, modes=modes))


def test_rows_of_ours_and_of_its_teacher(torchao):
    rows = measure("demo", "demo:clip", precisions=["float32", "int8"])
    plain, quantised = rows[:2], rows[2:]
    for before, after in zip(plain, quantised, strict=True):
        assert before.outcome == after.outcome == "complete" and after.precision == "int8" and after.time_ms > 0
        assert before.relative_error < 1e-3 < after.relative_error < 0.05
        assert after.parameters_m == before.parameters_m


def test_rows_in_float8_are_calibrated_on_other_images(float8_on_a_cpu, monkeypatch):
    calibrated_on = []

    def prepare(module, precision, mode, device, kernels, calibration):
        calibrated_on.append(calibration)
        return prepare_variant(module, precision, mode, device, kernels, calibration)

    monkeypatch.setattr(encoder, "prepare_variant", prepare)
    rows = list(
        measure_encoders(
            ["demo", "demo:clip"],
            CONDITIONS,
            sizes=[None],
            batches=[2],
            precisions=["bfloat16", "float8"],
            modes=["eager"],
        )
    )
    assert [row.outcome for row in rows] == 4 * ["complete"]
    for before, after in zip(rows[:2], rows[2:], strict=True):
        assert before.relative_error < after.relative_error < 0.06 and after.precision == "float8"
        assert after.weights_gib < before.weights_gib
    assert calibrated_on[:2] == [None, None]
    for name, calibration in zip(["demo", "demo:clip"], calibrated_on[2:], strict=True):
        tower = find_tower(name)(None)
        timed = tower.normalise(CONDITIONS.images.pixels(DISTINCT_IMAGES, tower.size))
        both = torch.cat([timed, calibration]).flatten(1)
        assert len(calibration) == 32 and len(torch.unique(both, dim=0)) == DISTINCT_IMAGES + 32


def test_bytes_are_those_of_the_quantised_weights(torchao):
    (plain, quantised) = measure("demo", precisions=["float32", "int8"])
    layers = [part for part in find_tower("demo")(None).module.encoder.cortex.modules() if isinstance(part, nn.Linear)]
    # A weight takes a byte in place of four, and each row of a matrix a scale.
    saved = sum(3 * layer.weight.numel() - 4 * layer.out_features for layer in layers)
    assert plain.weights_gib - quantised.weights_gib == pytest.approx(saved / 2**30, abs=1.1e-3)  # both are rounded


def test_of_ours_only_the_cortex_is_quantised(torchao):
    module = find_tower("demo")(None).module
    variant = quantise(module)
    cortex = {name for name in linear_layers(module) if name.startswith("encoder.cortex.")}
    assert quantised_layers(variant) == cortex and len(cortex) == 16
    assert quantised_layers(module) == set()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(variant.encoder(pixels).rois, module.encoder(pixels).rois, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["float8", "int8"])
def test_of_timm_and_transformers_all_layers_of_the_blocks_are(request, precision):
    request.getfixturevalue("float8_on_a_cpu" if precision == "float8" else "torchao")
    module = TimmTokens(
        timm.create_model("test_vit3", num_classes=0)
    )  # it has an attention pool, which gives no tokens
    pool = {f"model.attn_pool.{name}" for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")}
    assert linear_layers(module) - quantised_layers(quantise(module, precision, side=160)) == pool
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    module = HfTokens(CLIPVisionModel(config), ImageSize(64, 64))
    assert len(linear_layers(module)) == 12
    assert quantised_layers(quantise(module, precision)) == linear_layers(module)


@pytest.mark.parametrize("precision", ["float8", "int8"])
def test_of_open_clip_all_but_the_attention_of_pytorch_are(request, precision):
    request.getfixturevalue("float8_on_a_cpu" if precision == "float8" else "torchao")
    module = find_tower("demo:clip")(None).module
    assert quantised_layers(quantise(module, precision, side=224)) == {
        f"visual.transformer.resblocks.{block}.mlp.{name}" for block in range(6) for name in ("c_fc", "c_proj")
    }


def test_a_tower_without_such_blocks_is_no_complete_row(torchao):
    (row,) = measure("timm:test_resnet", precisions=["int8"])
    assert "no blocks with linear layers, so that 'int8' would change nothing" in row.outcome and row.time_ms == ""


def test_float8_needs_a_cuda_device():
    with pytest.raises(InputError, match=r"'float8' needs a CUDA device .*, got cpu; take int8"):
        measure("demo", precisions=["float32", "float8"])


def test_int8_needs_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"needs the package torchao, .* pip install 'sf_mllm\[quantize\]'"):
        check_support("int8", "eager", CPU)


def test_a_chat_has_them_not():
    assert parse_arguments(["encoder", "--precision", "int8", "float8"]).precision == ["int8", "float8"]
    with pytest.raises(InputError, match="invalid choice: 'int8'"):
        parse_arguments(["chat", "--precision", "int8"])
