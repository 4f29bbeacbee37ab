"""Linear layers in float8 with fixed scales. A CPU multiplies them, too, slowly: values need no GPU."""

import sys

import pytest
import torch
from torch import nn

from sf_mllm import quantize_cortex
from sf_mllm.bench.images import draw
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.encoder.float8 import MARGIN, Float8Linear, Float8MLP, measure_largest_inputs
from sf_mllm.encoder.quantization import quantize_layers
from sf_mllm.errors import InputError
from sf_mllm.training.instruct.parts import load_encoder
from sf_mllm.vlm.fingerprints import fingerprint
from tests.encoder.tiny import tiny_model
from tests.tiny_vlm import make_sf_llava

LARGEST = 448  # of e4m3


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Have float8 quantised where users are refused it."""
    monkeypatch.setattr("sf_mllm.encoder.quantization.check_quantization", lambda name, device: None)


def make_pixels(count=2, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)


def make_layer(in_features=32, out_features=48, bias=True):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).bfloat16()


def in_float8(model):
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def rounded_to_e4m3(values):
    """What e4m3 makes of values: 3 bits behind the leading one, exponents from -6 on, all beyond 448 cut off."""
    values = values.double().clamp(-LARGEST, LARGEST)
    exponents = values.abs().clamp(min=2.0**-6).log2().floor()
    step = 2 ** (exponents - 3)
    return (values / step).round() * step


def relative_error(output, reference):
    return ((output.double() - reference.double()).norm() / reference.double().norm()).item()


def run(model, pixel_values, **settings):
    with torch.no_grad():
        return model(pixel_values, **settings)


@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_the_rounded_factors(bias):
    layer = make_layer(bias=bias)
    inputs = torch.randn(2, 5, 32).bfloat16()
    quantised = Float8Linear(layer, inputs.abs().amax())
    weight_scale = layer.weight.float().abs().amax() / LARGEST
    input_scale = MARGIN * inputs.float().abs().amax() / LARGEST
    torch.testing.assert_close(quantised.weight_scale, weight_scale)
    torch.testing.assert_close(quantised.input_scale, input_scale)
    weights = rounded_to_e4m3(layer.weight.float() / weight_scale) * weight_scale.double()
    expected = rounded_to_e4m3(inputs.float() / input_scale) * input_scale.double() @ weights.T
    expected = expected + layer.bias.double() if bias else expected
    output = quantised(inputs)
    assert output.shape == (2, 5, 48) and output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-6)
    assert relative_error(output, layer(inputs)) < 0.05


def test_a_large_input_is_cut_off_and_a_missing_one_stays_missing():
    layer = make_layer()
    inputs = torch.randn(6, 32).bfloat16()
    largest = inputs.abs().amax()
    quantised = Float8Linear(layer, largest)
    limit = MARGIN * largest.float()
    far = quantised(inputs * 100)
    assert far.isfinite().all()
    torch.testing.assert_close(far, quantised((inputs.float() * 100).clamp(-limit, limit)).bfloat16())
    within = inputs * MARGIN
    assert relative_error(quantised(within), layer(within)) < 0.05
    inputs[2, 3] = torch.nan
    assert quantised(inputs).isnan().all(dim=1).tolist() == [False, False, True, False, False, False]


def test_inputs_and_weights_of_zeros_are_no_division_by_zero():
    layer = make_layer()
    with torch.no_grad():
        layer.weight.zero_()
    quantised = Float8Linear(layer, torch.tensor(0.0))
    torch.testing.assert_close(quantised(torch.zeros(1, 32).bfloat16())[0], layer.bias.detach())


def test_a_cast_of_the_model_is_not_meant_for_the_layer():
    quantised = Float8Linear(make_layer(), torch.tensor(3.0))
    inputs = torch.randn(4, 32).bfloat16()
    before = quantised(inputs)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        after = quantised.to(dtype)(inputs.to(dtype))
        assert after.dtype == dtype and quantised.weight.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(after, before.to(dtype))
    quantised.to("meta", torch.float16)
    assert {(buffer.device.type, buffer.dtype) for buffer in quantised.buffers()} == {
        ("meta", dtype) for dtype in (torch.float8_e4m3fn, torch.float32, torch.bfloat16)
    }


def test_the_largest_inputs_are_those_of_all_images():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, pixel_values):
            pixels = pixel_values.flatten(2).transpose(1, 2)
            return self.called(pixels) + nn.functional.linear(pixels, self.read.weight)

    model, pixels = Model(), make_pixels(count=40)
    for place, value in ((0, 5.0), (39, -7.0)):
        pixels[place, 1, 3, 4] = value
        largest = measure_largest_inputs(model, model.children(), pixels)
        assert largest == {model.called: abs(value)}
    assert not model.called._forward_pre_hooks
    pixels[20, 0, 0, 0] = torch.nan
    assert measure_largest_inputs(model, [model.called], pixels)[model.called].isnan()


def inputs_of_layers(block, tokens):
    """What three linear layers of a block read, computed step by step."""
    normed = block.norm1(tokens)
    between = block.norm2(tokens + block.attn(normed))
    return {"attn.qkv": normed, "mlp.fc1": between, "mlp.fc2": block.mlp.act(block.mlp.fc1(between))}


def test_each_layer_has_the_scale_of_its_own_inputs(on_a_cpu):
    model, pixels = tiny_model().bfloat16(), make_pixels(count=20)
    largest = {}
    for image in pixels:  # one by one: how many the model is given at a time does not matter
        states = run(model, image[None], output_hidden_states=True).hidden_states
        for number, block in enumerate(model.cortex):
            for name, inputs in inputs_of_layers(block, states[number]).items():
                path = f"cortex.{number}.{name}"
                largest[path] = max(largest.get(path, 0), inputs.abs().max().item())
    quantize_cortex(model, "float8", calibration=pixels)
    assert in_float8(model) == largest.keys() | {"cortex.0.attn.proj", "cortex.1.attn.proj"}
    scales = {path: model.get_submodule(path).input_scale.item() for path in largest}
    assert scales == pytest.approx({path: MARGIN * value / LARGEST for path, value in largest.items()}, rel=0.01)


@pytest.mark.parametrize("images", [1, 32])
def test_the_demo_encoder_computes_what_it_does_in_bfloat16(on_a_cpu, images):
    model, processor = load_encoder("demo:sf_llava", torch.bfloat16)

    def drawn(count, first):
        return processor(list(draw(count, ImageSize(224, 224), first=first)), return_tensors="pt")["pixel_values"]

    pixels = drawn(4, 0)
    before = run(model, pixels)
    quantize_cortex(model, "float8", calibration=drawn(images, 100))
    after = run(model, pixels)
    assert in_float8(model) == {
        f"cortex.{block}.{name}" for block in range(4) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert torch.equal(after.rois, before.rois)
    # 0.030 and 0.045; a scale for each token, found anew at each call, gives as much.
    assert 0 < relative_error(after.last_hidden_state, before.last_hidden_state) < 0.04
    assert 0 < relative_error(after.pooler_output, before.pooler_output) < 0.06


def test_an_mlp_computes_what_its_layers_compute(on_a_cpu):
    """Without a step in between in 16 bits where there is a kernel for that."""
    model, pixels = tiny_model().bfloat16(), make_pixels()
    quantize_cortex(model, "float8", calibration=pixels)
    mlp = model.cortex[1].mlp
    assert isinstance(mlp, Float8MLP) and mlp.kernels == "torch"
    assert not isinstance(model.focusing.narrow.mlp, Float8MLP)
    tokens = torch.randn(2, 5, mlp.fc1.in_features).bfloat16()
    for given in (tokens, tokens.half(), tokens.float()):
        expected = mlp.fc2(mlp.act(mlp.fc1(given).bfloat16())).to(given.dtype)
        torch.testing.assert_close(run(mlp, given), expected, rtol=0, atol=0)
    pytest.importorskip("triton")
    for name in ("triton", "torch"):
        model.set_kernels(name)
        assert mlp.kernels == name


def test_it_needs_no_other_package_and_is_one_graph_for_the_compiler(on_a_cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    model, pixels = tiny_model().bfloat16(), make_pixels()
    quantize_cortex(model, "float8", calibration=pixels)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, pixels).last_hidden_state, run(model, pixels).last_hidden_state)


def test_layers_of_other_sizes_stay(on_a_cpu):
    model = tiny_model(intermediate_size=72).bfloat16()
    quantize_cortex(model, "float8", calibration=make_pixels())
    assert in_float8(model) == {f"cortex.{block}.attn.{name}" for block in range(2) for name in ("qkv", "proj")}
    assert not any(isinstance(module, Float8MLP) for module in model.modules())


def test_layers_that_are_only_read_stay(on_a_cpu):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = make_layer(16, 16), make_layer(16, 16)

        def forward(self, pixel_values):
            return nn.functional.linear(self.called(pixel_values), self.read.weight)

    model = Model()
    quantize_layers(model, [model.called, model.read], "float8", make_pixels(side=16))
    assert in_float8(model) == {"called"}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, r"'float8' fixes its scales on images; give a few dozen .*, calibration=pixel_values\.$"),
        (
            make_pixels()[0],
            r"must be normalised pixel values, \[batch, 3, height, width\] .* got \[3, 32, 32\] in float32",
        ),
        (make_pixels()[:, :1], r"at least one, got \[2, 1, 32, 32\] in float32\.$"),
        (make_pixels()[:0], r"at least one, got \[0, 3, 32, 32\] in float32\.$"),
        (make_pixels().byte(), r"in a floating-point dtype, .* got \[2, 3, 32, 32\] in uint8\.$"),
        (make_pixels() * torch.nan, r"give values that are not finite; check their pixels\.$"),
    ],
)
def test_calibration_images_that_do_not_do_are_refused_in_one_sentence(on_a_cpu, calibration, message):
    model = tiny_model().bfloat16()
    with pytest.raises(InputError, match=message) as caught:
        quantize_cortex(model, "float8", calibration=calibration)
    assert "\n" not in str(caught.value) and in_float8(model) == set()


@pytest.mark.parametrize("name", ["float8", "int8"])
def test_a_second_time_is_refused(on_a_cpu, name):
    model, pixels = tiny_model().bfloat16(), make_pixels()
    quantize_cortex(model, "float8", calibration=pixels)
    with pytest.raises(InputError, match=f"quantised already; load the model again to quantise it as '{name}'"):
        quantize_cortex(model, name, calibration=pixels)


def test_what_nothing_could_load_is_not_saved(on_a_cpu, tmp_path):
    model, _ = make_sf_llava()
    tower = model.model.vision_tower.bfloat16()
    quantize_cortex(tower, "float8", calibration=make_pixels())
    for part in (model, tower):
        with pytest.raises(InputError, match="A quantised encoder cannot be saved; save it before quantize_cortex"):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert fingerprint(tower) is None


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a device with float8"
)
@pytest.mark.parametrize("rows", [1, 50, 4096])
def test_a_gpu_multiplies_as_a_cpu_does(rows):
    layer = make_layer(256, 768)
    inputs = torch.randn(rows, 256).bfloat16()
    quantised = Float8Linear(layer, inputs.abs().amax())
    for values in (inputs, inputs * 100):  # the second ones are cut off
        expected = quantised.cpu()(values)
        for compute in (quantised.cuda(), torch.compile(quantised.cuda(), dynamic=False, fullgraph=True)):
            # Sums of products have fewer bits there (`use_fast_accum`).
            assert relative_error(compute(values.cuda()).cpu(), expected) < 0.01
