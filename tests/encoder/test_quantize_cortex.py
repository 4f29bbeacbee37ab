import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sf_mllm import quantize_cortex
from sf_mllm.encoder.float8 import Float8Linear
from sf_mllm.encoder.quantization import check_quantization
from sf_mllm.errors import InputError
from sf_mllm.training.instruct.parts import load_encoder
from tests.encoder.tiny import tiny_model

needs_float8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a device with float8"
)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao")


@pytest.fixture
def pixel_values():
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)


def run(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values)


def quantised_layers(model):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, Float8Linear) or is_quantised(getattr(module, "weight", None))
    }


def is_quantised(weight):
    return weight is not None and is_traceable_wrapper_subclass(weight)


def linear_layers_of_the_cortex(model):
    return {f"cortex.{name}" for name, module in model.cortex.named_modules() if isinstance(module, nn.Linear)}


def relative_error(output, reference):
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


def test_the_cortex_multiplies_in_int8_and_regions_stay(torchao, pixel_values):
    model, _ = load_encoder("demo:sf_llava", torch.float32)
    before = run(model, pixel_values)
    quantize_cortex(model, "int8")
    after = run(model, pixel_values)
    assert quantised_layers(model) == linear_layers_of_the_cortex(model)
    assert len(quantised_layers(model)) == 4 * len(model.cortex)
    assert 0 < relative_error(after.last_hidden_state, before.last_hidden_state) < 0.05
    assert 0 < relative_error(after.pooler_output, before.pooler_output) < 0.05
    torch.testing.assert_close(after.rois, before.rois, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_weights_become_int8(torchao, family, dtype, pixel_values):
    model = tiny_model(family).to(dtype)
    before = run(model, pixel_values)
    quantize_cortex(model, "int8")
    after = run(model, pixel_values)
    assert quantised_layers(model) == linear_layers_of_the_cortex(model)
    assert after.last_hidden_state.dtype == dtype and model.dtype == dtype
    assert 0 < relative_error(after.last_hidden_state, before.last_hidden_state) < 0.05
    assert torch.equal(after.rois, before.rois)


def test_it_is_one_graph_for_the_compiler(torchao, pixel_values):
    model = tiny_model()
    quantize_cortex(model, "int8")
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    pixels = pixel_values[..., :64, :64]
    torch.testing.assert_close(run(compiled, pixels).last_hidden_state, run(model, pixels).last_hidden_state)


def test_settings_of_the_process_stay(torchao):
    before = torch._inductor.config.save_config_portable()
    quantize_cortex(tiny_model(), "int8")
    assert torch._inductor.config.save_config_portable() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4", r"'int4' is unknown\. Did you mean 'int8'\? Allowed: float8, int8"),
        ("float8", r"needs a CUDA device of compute capability 8\.9 or higher, got cpu; take int8\.$"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence(torchao, name, message):
    model = tiny_model().bfloat16()
    with pytest.raises(InputError, match=message):
        quantize_cortex(model, name)
    assert quantised_layers(model) == set()


def test_int8_takes_no_calibration_images(torchao, pixel_values):
    model = tiny_model()
    with pytest.raises(InputError, match="'int8' scales activations at each call; leave the calibration images out"):
        quantize_cortex(model, "int8", calibration=pixel_values)
    assert quantised_layers(model) == set()


def test_older_devices_and_other_weights_are_refused_for_float8(monkeypatch):
    capabilities = {"cuda:0": (8, 0), "cuda:1": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    check_quantization("float8", torch.device("cuda:1"))
    with pytest.raises(InputError, match=r"capability 8\.9 or higher, got cuda:0"):
        check_quantization("float8", torch.device("cuda:0"))
    monkeypatch.setattr("sf_mllm.encoder.quantization.check_quantization", lambda name, device: None)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(InputError, match=rf"needs weights in bfloat16, got {str(dtype)[6:]}; cast the model first"):
            quantize_cortex(tiny_model().to(dtype), "float8")


def test_a_second_time_is_refused(torchao):
    model = tiny_model()
    quantize_cortex(model, "int8")
    with pytest.raises(InputError, match="quantised already"):
        quantize_cortex(model, "int8")


def test_what_nothing_could_load_is_not_saved(torchao, tmp_path):
    model = tiny_model()
    quantize_cortex(model, "int8")
    with pytest.raises(InputError, match="A quantised encoder cannot be saved"):
        model.save_pretrained(tmp_path)


def test_without_torchao_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        InputError, match=r"needs the package torchao, .*; pip install 'sf_mllm\[quantize\]'\."
    ) as caught:
        quantize_cortex(tiny_model(), "int8")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@needs_float8
@pytest.mark.parametrize("name", ["float8", "int8"])
def test_the_cortex_multiplies_in_8_bits_on_a_gpu(name, pixel_values):
    if name == "int8":
        pytest.importorskip("torchao")
    encoder, _ = load_encoder("demo:sf_llava", torch.bfloat16)
    model, pixels = encoder.cuda(), pixel_values.cuda().bfloat16()
    run(model, pixels)  # PyTorch's attention may round differently at its first call
    before = run(model, pixels)
    layers = linear_layers_of_the_cortex(model)
    quantize_cortex(model, name, calibration=-pixels if name == "float8" else None)
    after = run(model, pixels)
    assert quantised_layers(model) == layers
    assert torch.equal(after.rois, before.rois)
    assert 0 < relative_error(after.last_hidden_state, before.last_hidden_state) < 0.06
    compiled = run(torch.compile(model, dynamic=False, fullgraph=True), pixels)
    assert relative_error(compiled.last_hidden_state, before.last_hidden_state) < 0.06
