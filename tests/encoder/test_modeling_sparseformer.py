"""The encoder as a model: outputs, sizes, precision, copies, checkpointing, saving."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sf_mllm import SparseFormerConfig, SparseFormerModel
from sf_mllm.encoder.cortex import drop_path
from sf_mllm.encoder.focusing import drop_path_rates
from sf_mllm.errors import InputError
from tests.encoder.tiny import tiny_config, tiny_model

PUBLISHED_COST = {  # parameters, GMACs at 224, entries of the state dict, tokens
    "sparseformer_v1_tiny": (31_522_212, 2.178, 154, 49),
    "sparseformer_v1_small": (47_575_056, 3.990, 154, 64),
    "sparseformer_v1_base": (81_076_996, 7.987, 178, 81),
    "sparseformer_btsp_augreg_base": (64_185_448, 3.778, 157, 49),
    "sparseformer_btsp_augreg_large": (212_426_984, 11.343, 253, 49),
    "sparseformer_btsp_openai_clip_base": (63_809_664, 3.778, 156, 49),
    "sparseformer_btsp_openai_clip_large": (212_188_476, 14.823, 252, 64),
}


@pytest.mark.parametrize("name", PUBLISHED_COST)
def test_published_configurations_cost_what_the_official_models_cost(name: str) -> None:
    parameters, gmacs, entries, tokens = PUBLISHED_COST[name]
    with torch.device("meta"):
        model = SparseFormerModel(SparseFormerConfig.from_name(name)).eval()
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert len(model.state_dict()) == entries
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = model(torch.empty(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 3) == gmacs
    assert output.last_hidden_state.shape == (1, tokens, model.config.hidden_size)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (9, 70), (101, 67), (1, 1)])
def test_any_image_size_gives_the_same_fields_and_token_count(family: str, size: tuple[int, int]) -> None:
    model = tiny_model(family)
    config = model.config
    samplings = config.focusing_repeats + 1
    adjustments = config.focusing_repeats + (family == "v1")
    with torch.no_grad():
        output = model(torch.randn(2, 3, *size), output_hidden_states=True, output_sampling_points=True)
    assert output.last_hidden_state.shape == (2, config.num_tokens, config.hidden_size)
    assert output.pooler_output.shape == (2, config.projection_size)
    assert output.rois.shape == (2, adjustments + 1, config.num_latents, 4)
    assert len(output.sampling_points) == samplings
    assert output.sampling_points[0].shape == (2, config.num_latents, config.num_sampling_points, 2)
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(output.rois[:, 0], model.initial.rois.expand(2, -1, -1))
    assert all(torch.isfinite(tensor).all() for tensor in (output.last_hidden_state, output.rois))


def test_fields_do_not_depend_on_what_is_requested() -> None:
    model = tiny_model()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain, full = model(images), model(images, output_hidden_states=True, output_sampling_points=True)
        assert plain.hidden_states is None and plain.sampling_points is None
        for name in ("last_hidden_state", "pooler_output", "rois"):
            assert torch.equal(plain[name], full[name])
        # transformers' LLaVA passes layer numbers; layer 0 is falsy and still a request.
        for request in (0, -1, [0, -1]):
            assert len(model(images, output_hidden_states=request).hidden_states) == len(full.hidden_states)
        assert model(images, output_hidden_states=False).hidden_states is None
        assert isinstance(model(images, return_dict=False), tuple)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32)])
def test_wrong_pixel_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pixel_values must be"):
        tiny_model()(torch.randn(shape))


def test_images_of_a_batch_do_not_mix() -> None:
    model = tiny_model()
    images = torch.randn(3, 3, 40, 24)
    with torch.no_grad():
        together = model(images)
        for index in range(3):
            alone = model(images[index : index + 1])
            torch.testing.assert_close(together.last_hidden_state[index], alone.last_hidden_state[0])
            torch.testing.assert_close(together.rois[index], alone.rois[0])


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
def test_gradients_of_a_batch_are_the_sums_of_its_images(family: str) -> None:
    """Also of what is computed once for all of them."""
    model = tiny_model(family)
    images = torch.randn(3, 3, 40, 24)

    def gradients(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        output = model(batch)
        (output.last_hidden_state.square().sum() + output.rois.square().sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, alone = gradients(images), [gradients(image[None]) for image in images]
    assert "initial.rois" in together and "initial.embedding" in together
    for name, gradient in together.items():
        expected = sum(each[name] for each in alone)
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, atol=1e-5 * scale, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_what_all_images_share_is_computed_once() -> None:
    """The first points, matrices and codes, which depend on no image: of the published cost of each further one."""
    with torch.device("meta"):
        model = SparseFormerModel(SparseFormerConfig.from_name("sparseformer_btsp_openai_clip_base")).eval()
        block = model.focusing.narrow
        flops = []
        for batch_size in (1, 4):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                output = model(torch.empty(batch_size, 3, 224, 224), output_sampling_points=True)
            flops.append(counter.get_total_flops())
    layers = (block.sampler.offsets, block.mixing.squeeze, block.mixing.generate, block.roi_code.linear)
    shared = sum(2 * model.config.num_latents * layer.weight.numel() for layer in layers)
    assert flops[1] == 4 * flops[0] - 3 * shared
    assert len(output.rois) == 4 and all(len(points) == 4 for points in output.sampling_points)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_regions_in_fp32(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reference = model(images, output_sampling_points=True)
        with torch.autocast("cpu", dtype=dtype):
            output = model(images, output_sampling_points=True)
    assert output.rois.dtype == output.sampling_points[0].dtype == torch.float32
    assert not torch.equal(output.pooler_output.float(), reference.pooler_output)  # autocast was on
    scale = reference.pooler_output.abs().max()
    # Measured on this model: at most 0.02 of the largest value for bf16, 0.002 for fp16.
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype] * scale
    assert (output.pooler_output.float() - reference.pooler_output).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coordinates_are_computed_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    """Not only returned in fp32: a layer run in bf16 would already have rounded them."""
    model = tiny_model("v1")
    block = model.focusing.narrow
    latents, rois = torch.randn(2, 5, 16), model.initial.rois.expand(2, -1, -1)
    with torch.no_grad():
        points, deltas = block.sampler(latents, rois), block.roi_adjustment(latents)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(block.sampler(latents, rois), points)
            torch.testing.assert_close(block.roi_adjustment(latents), deltas)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
def test_a_bf16_model_keeps_its_initial_regions(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        model.initial.rois.add_(0.001234)
    images = torch.randn(2, 3, 32, 32)
    reference = model(images)
    half = copy.deepcopy(model).to(torch.bfloat16)
    output = half(images)  # fp32 pixels are cast by the model
    assert half.initial.rois.dtype == torch.float32
    assert torch.equal(output.rois[:, 0], reference.rois[:, 0])
    assert output.rois.dtype == torch.float32
    assert output.last_hidden_state.dtype == output.pooler_output.dtype == torch.bfloat16
    scale = reference.pooler_output.abs().max()
    assert (output.pooler_output.float() - reference.pooler_output).abs().max() < 0.1 * scale


def test_a_model_cast_between_two_steps_keeps_the_gradient_of_its_regions() -> None:
    model = tiny_model().train()
    model(torch.randn(1, 3, 32, 32)).rois.square().sum().backward()
    before = model.initial.rois.grad.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.initial.rois.grad, before) and model.stem.conv.weight.grad.dtype == torch.bfloat16


def test_deep_copies_are_independent_and_equal() -> None:
    model = tiny_model()
    images = torch.randn(1, 3, 32, 32)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(images).last_hidden_state, clone(images).last_hidden_state)
        clone.initial.rois.add_(0.1)
        assert not torch.equal(model(images).rois, clone(images).rois)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
def test_activation_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = tiny_model(family).train()
    images = torch.randn(2, 3, 32, 32)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(images)
        (output.pooler_output.square().mean() + output.rois.square().mean()).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    checkpointed = gradients()
    assert len(plain) == len(checkpointed) == len(list(model.parameters()))
    for first, second in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_is_one_graph_for_the_compiler(family: str, autocast: bool) -> None:
    model = tiny_model(family)
    images = torch.randn(2, 3, 40, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # traces, without a code generator
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(images).last_hidden_state, model(images).last_hidden_state)


def test_save_and_load_is_exact_and_safe(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = SparseFormerModel.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    half = SparseFormerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.initial.rois.dtype == torch.float32 and half.norm.weight.dtype == torch.bfloat16


def test_loading_is_strict(tmp_path: Path) -> None:
    model = tiny_model()
    weights = model.state_dict()
    del weights["norm.weight"]
    weights["stray.weight"] = torch.zeros(2)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"norm\.weight.*stray\.weight"):
        SparseFormerModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("num_latents", [1, 2, 3, 5, 12, 48, 63])
def test_tokens_of_a_new_model_are_all_different(num_latents: int) -> None:
    torch.manual_seed(0)
    model = SparseFormerModel(tiny_config(num_latents=num_latents)).eval()
    with torch.no_grad():
        tokens = model(torch.randn(1, 3, 32, 32)).last_hidden_state[0]
    distances = torch.cdist(tokens, tokens) + torch.eye(len(tokens))
    assert distances.min() > 1e-4


def test_official_start_leaves_twins() -> None:
    torch.manual_seed(0)
    model = SparseFormerModel(tiny_config(num_latents=12, initial_roi_layout="official_grid")).eval()
    with torch.no_grad():
        tokens = model(torch.randn(1, 3, 32, 32)).last_hidden_state[0, 1:]
    torch.testing.assert_close(tokens[9], tokens[11])


def test_new_model_starts_with_still_regions_and_shared_points() -> None:
    torch.manual_seed(0)
    model = SparseFormerModel(tiny_config()).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 32, 32), output_sampling_points=True)
    torch.testing.assert_close(output.rois[:, -1], output.rois[:, 0])
    # The regular 3x3 grid, normalised by its own spread, reaches 0.385 of the box on either side of the centre.
    box = output.rois[0, 0, 0]
    center, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    relative = (output.sampling_points[0][0, 0] - center) / size
    assert relative.abs().max() == pytest.approx(0.385, abs=1e-3)
    x, y = relative.unflatten(0, (3, 3)).unbind(-1)
    assert (x.diff(dim=1) > 0.1).all() and (y.diff(dim=0) > 0.1).all()  # x is the fast index


def test_starting_values_are_the_published_ones() -> None:
    """Distributions by their spread or bound, at a width where a sample shows them; everything else exactly."""
    torch.manual_seed(0)
    model = SparseFormerModel(tiny_config(hidden_size=256, intermediate_size=512, num_sampling_points=12))
    block, cortex = model.focusing.wide, model.cortex[0]
    assert cortex.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(cortex.mlp.fc1.bias, torch.zeros(512))
    assert torch.equal(cortex.norm1.weight, torch.ones(256)) and torch.equal(cortex.norm1.bias, torch.zeros(256))
    for norm in (block.sampler.norm, block.mixing.norm):
        torch.testing.assert_close(norm.weight, torch.full((256,), 1 / 16), rtol=0, atol=0)
    for layer in (block.sampler.offsets, model.focusing.narrow.roi_adjustment.out, block.mixing.generate):
        assert not layer.weight.any()
    channels, points, out_points = 8, 12, 32
    channel_part, point_part = block.mixing.generate.bias.split([channels**2, points * out_points])
    for part, bound in ((channel_part, (3 / channels) ** 0.5), (point_part, (6 / (points + out_points)) ** 0.5)):
        assert 0.9 * bound < part.abs().max() <= bound
    assert 0.4 < block.sampler.shared_offsets.abs().max() <= 0.5  # 12 is no square, so there is no grid
    assert 1 < model.initial.embedding.abs().max() <= 2
    fan_out = channels * 49
    assert model.stem.conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert 0.5 / 147**0.5 < model.stem.conv.bias.abs().max() <= 1 / 147**0.5
    assert model.cls_token.std().item() == pytest.approx(1, rel=0.2)
    assert model.focusing.stage_embedding.std().item() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("pooling", ["cls", "mean_then_norm", "norm_then_mean"])
def test_pooling_of_a_model_with_a_class_token(pooling: str) -> None:
    model = tiny_model(pooling=pooling)
    with torch.no_grad():
        model.norm.weight.normal_()
        tokens = torch.randn(2, 6, 32)
        expected = {
            "cls": model.norm(tokens[:, 0]),
            "mean_then_norm": model.norm(tokens[:, 1:].mean(dim=1)),
            "norm_then_mean": model.norm(tokens[:, 1:]).mean(dim=1),
        }[pooling]
        torch.testing.assert_close(model.pool(tokens, model.norm(tokens)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sampling_points": 1}, "at least 2"),
        ({"num_latents": 0}, "num_latents"),
        ({"num_attention_heads": 5}, "must divide"),
        ({"focusing_size": 10, "focusing_num_attention_heads": 1}, "multiple of 4"),
        ({"use_cls_token": False}, "pooling"),
        ({"initial_roi_layout": "grid"}, "official_grid"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"initial_roi_layout": "official_grid", "num_latents": 3}, "at least 4"),
        ({"hidden_act": "qick_gelu"}, "Did you mean 'quick_gelu'"),
        ({"focusing_hidden_act": "gellu"}, "Did you mean 'gelu'"),
        ({"focusing_mixing_size": 0}, "focusing_mixing_size"),
        ({"sampling_mixing_size": -3}, "sampling_mixing_size"),
        ({"projection_size": 0}, "projection_size"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(**change)


def test_unknown_published_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'sparseformer_v1_tiny'"):
        SparseFormerConfig.from_name("sparseformer_v1_tin")


def test_stochastic_depth_acts_in_training_only() -> None:
    model = tiny_model("v1", drop_path_rate=0.9)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)
        model.train()
        assert not torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)


def test_stochastic_depth_grows_from_zero_and_keeps_the_mean() -> None:
    assert drop_path_rates(tiny_config(drop_path_rate=0.4)) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    model = tiny_model(drop_path_rate=0.4)
    assert model.focusing.drop_path_rates == pytest.approx([0, 0.1, 0.2])
    assert [block.drop_path_rate for block in model.cortex] == pytest.approx([0.3, 0.4])
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 1, 3), 0.4, training=True)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dropped[:, 0, 0], dropped[:, 0, 2])  # a sample is kept or dropped as a whole
