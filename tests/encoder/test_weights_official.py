"""Files and state dicts that are, or pretend to be, official checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sf_mllm import SparseFormerConfig, load_official_checkpoint
from sf_mllm.encoder.published import PUBLISHED
from sf_mllm.errors import InputError
from tests.encoder.official_fixtures import read_fixture


def official_state_of(name: str) -> dict[str, torch.Tensor]:
    """An official-looking state dict of a published size, random, made from the published key schema."""
    config = SparseFormerConfig.from_name(name)
    small, wide, channels = config.focusing_size, config.hidden_size, config.stem_channels
    points, out_points = config.num_sampling_points, max(config.num_sampling_points, 32)
    bootstrapped = config.family == "bootstrapped"
    shapes: dict[str, tuple[int, ...]] = {
        "feat_extractor.conv1.weight": (channels, 3, 7, 7),
        "feat_extractor.conv1.bias": (channels,),
        "initial_roi.weight": (config.num_latents, 4),
        "initial_embedding.weight": (1 if bootstrapped else config.num_latents, small),
        "layers.1.0.weight": (wide, small),
        "layers.1.0.bias": (wide,),
        "norm.weight": (wide,),
        "norm.bias": (wide,),
        "proj.weight": (config.projection_size, wide),
    }
    if config.projection_bias:
        shapes["proj.bias"] = (config.projection_size,)
    if bootstrapped:
        shapes.update({"cls_embedding.weight": (1, wide), "layers.0.stage_embedding.weight": (4, small)})
    else:
        shapes.update({"layers.1.1.weight": (wide,), "layers.1.1.bias": (wide,)})
    for unit in (0, *range(2, config.num_hidden_layers + 3)):
        width = small if unit == 0 else wide
        p = f"layers.{unit}."
        if not bootstrapped or unit != 2:
            for layer, shape in {
                "norm1": (width,),
                "norm2": (width,),
                "attn.qkv": (3 * width, width),
                "attn.proj": (width, width),
                "mlp.fc1": (4 * width, width),
                "mlp.fc2": (width, 4 * width),
            }.items():
                shapes.update({f"{p}{layer}.weight": shape, f"{p}{layer}.bias": shape[:1]})
        if unit in (0, 2):
            inner = 128 if bootstrapped else width // 4
            generated = channels**2 + out_points * points
            m = f"{p}adaptive_mixing."
            for layer, shape in {
                f"{p}roi_offset_module.0": (width,),
                f"{m}parameter_generator.0": (width,),
                f"{m}parameter_generator.1": (inner, width),
                f"{m}parameter_generator.2": (generated, inner),
                f"{m}out_proj": (width, out_points * channels),
            }.items():
                shapes.update({f"{layer}.weight": shape, f"{layer}.bias": shape[:1]})
            shapes[f"{p}roi_offset_bias"] = (2 * points,)
            shapes[f"{p}roi_offset_module.1.weight"] = (2 * points, width)
            if bootstrapped:
                shapes.update({f"{p}pe_transition.{i}.bias": (width,) for i in (0, 1)})
                shapes.update({f"{p}pe_transition.0.weight": (width,), f"{p}pe_transition.1.weight": (width, width)})
            else:
                shapes.update({f"{m}m_beta": (channels,), f"{m}s_beta": (out_points,)})
            if not bootstrapped or unit == 0:
                shapes.update({f"{p}roi_adjust_module.0.{kind}": (width,) for kind in ("weight", "bias")})
                if bootstrapped:
                    shapes.update(
                        {
                            f"{p}roi_adjust_module.1.weight": (width, width),
                            f"{p}roi_adjust_module.1.bias": (width,),
                            f"{p}roi_adjust_module.3.weight": (4, width),
                        }
                    )
                else:
                    shapes[f"{p}roi_adjust_module.1.weight"] = (4, width)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_is_recognised_by_its_shapes(name: str) -> None:
    state = official_state_of(name)
    model = load_official_checkpoint(state)
    expected = SparseFormerConfig.from_name(name)
    assert model.config.to_diff_dict() == expected.to_diff_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(t.numel() for t in state.values())
    torch.testing.assert_close(
        model.focusing.wide.mixing.generate.weight,
        state["layers.2.adaptive_mixing.parameter_generator.2.weight"],
        rtol=0,
        atol=0,
    )
    assert not model.training


@pytest.mark.parametrize(("suffix", "wrapped"), [(".pth", False), (".pth", True), (".safetensors", False)])
def test_files_bare_and_wrapped(tmp_path: Path, wrapped: bool, suffix: str) -> None:
    state, tensors, config = read_fixture("btsp_clip_a")
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".pth":
        torch.save({"model": state} if wrapped else state, path)
    else:
        save_file(state, path)
    model = load_official_checkpoint(path, official_config=config)
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["input"]).pooler_output, tensors["output"], rtol=0, atol=1e-4)


def test_the_model_does_not_share_memory_with_the_state_dict() -> None:
    state, _, config = read_fixture("btsp_clip_a")
    before = {key: tensor.clone() for key, tensor in state.items()}
    model = load_official_checkpoint(state, official_config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_name_of_the_file_gives_the_configuration(tmp_path: Path) -> None:
    name = "sparseformer_v1_tiny"
    path = tmp_path / f"{name}_converted.pth"
    torch.save({"model": official_state_of(name)}, path)
    assert load_official_checkpoint(path).config.num_attention_heads == 64


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        load_official_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.3.attn.qkv.weight"), "lacks weights for cortex.0.attn.qkv.weight"),
        (lambda s: s.pop("layers.0.stage_embedding.weight"), "stage_embedding.*official renaming helper"),
        (lambda s: s.update({"head.norm.weight": torch.zeros(3)}), "head.norm.weight"),
        (lambda s: s.update({"layers.9.norm1.weight": torch.zeros(3)}), "layers.9.norm1.weight"),
        (lambda s: s.update({"proj.weight": torch.zeros(24, 64)}), r"projection.weight.*\(24, 64\).*\(24, 128\)"),
        (lambda s: s.pop("feat_extractor.conv1.weight"), "feat_extractor.conv1.weight"),
    ],
)
def test_misfits_are_named(change, message: str) -> None:
    state, _, config = read_fixture("btsp_clip_a")
    change(state)
    with pytest.raises(InputError, match=message):
        load_official_checkpoint(state, official_config=config)


def test_missing_stage_embedding_is_said_for_published_sizes_too() -> None:
    state = official_state_of("sparseformer_btsp_openai_clip_base")
    del state["layers.0.stage_embedding.weight"]
    with pytest.raises(InputError, match="stage_embedding"):
        load_official_checkpoint(state)


def test_unknown_shapes_need_a_configuration() -> None:
    state, _, _ = read_fixture("btsp_clip_a")
    with pytest.raises(InputError, match="pass official_config"):
        load_official_checkpoint(state)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="broken"):
        load_official_checkpoint(path)


def test_missing_file() -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_official_checkpoint("nowhere.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("width_configs"), "width_configs"),
        (lambda c: c["ops_list"].__setitem__(1, ["ATTN"]), "ops_list"),
        (lambda c: c.update(width_configs=[64, 128, 256]), "widths"),
        (lambda c: c.update(cls_token_insert_layer=1), "cls_token_insert_layer"),
        (lambda c: c["compatible_config"].update(mixing_bias=True), "mixing_bias"),
        (lambda c: c["compatible_config"].update(grid_sample_config={"mode": "nearest"}), "nearest"),
    ],
)
def test_configurations_of_no_family_are_refused(change, message: str) -> None:
    state, _, config = read_fixture("btsp_augreg_a")
    change(config)
    with pytest.raises(InputError, match=message):
        load_official_checkpoint(state, official_config=config)


def test_equal_widths_have_no_transition_and_no_index_for_it() -> None:
    """The official list of layers skips the transition where the width does not change."""
    state, _, config = read_fixture("btsp_clip_a")
    wide = {key: tensor for key, tensor in state.items() if key.startswith("layers.2.")}
    shifted = {
        re_index(key): tensor
        for key, tensor in state.items()
        if not key.startswith(("layers.0.", "layers.1.", "initial_embedding"))
    }
    generator = torch.Generator().manual_seed(0)
    shifted.update({key.replace("layers.2.", "layers.0."): tensor for key, tensor in wide.items()})
    shifted.update({key.replace("layers.3.", "layers.0."): t for key, t in state.items() if "layers.3." in key})
    shifted["initial_embedding.weight"] = torch.randn(1, 128, generator=generator)
    shifted["layers.0.stage_embedding.weight"] = torch.randn(4, 128, generator=generator)
    for name, shape in {"0.weight": (128,), "0.bias": (128,), "1.weight": (128, 128), "1.bias": (128,)}.items():
        shifted[f"layers.0.roi_adjust_module.{name}"] = torch.randn(shape, generator=generator)
    shifted["layers.0.roi_adjust_module.3.weight"] = torch.zeros(4, 128)
    config["width_configs"] = [128, 128, 128]
    model = load_official_checkpoint(shifted, official_config=config)
    assert isinstance(model.focusing.transition, torch.nn.Identity)
    torch.testing.assert_close(model.cortex[0].norm1.weight, state["layers.3.norm1.weight"])


def re_index(key: str) -> str:
    return key.replace("layers.2.", "layers.1.").replace("layers.3.", "layers.2.")


@pytest.mark.parametrize(("name", "activation"), [("btsp_clip_a", "quick_gelu"), ("btsp_augreg_a", "gelu")])
def test_a_focusing_block_that_runs_once_has_the_cortexs_activation_and_no_stage_embedding(name, activation) -> None:
    """The official rule is "units that are not repeated"."""
    state, _, config = read_fixture(name)
    assert load_official_checkpoint(state, official_config=config).config.focusing_hidden_act == "gelu"
    del state["layers.0.stage_embedding.weight"]
    config["repeats"] = [1] * len(config["repeats"])
    model = load_official_checkpoint(state, official_config=config)
    assert model.config.focusing_hidden_act == activation
    assert model.focusing.stage_embedding is None


NOT_SIZES = (
    *("family", "shared_latent_embedding", "initial_roi_layout", "focusing_hidden_act", "focusing_layer_norm_eps"),
    *("padding_mode", "hidden_act", "layer_norm_eps", "use_cls_token", "pooling", "projection_bias"),
)


@pytest.mark.parametrize(
    ("fixture", "names"),
    [
        ("v1_a", ("sparseformer_v1_tiny", "sparseformer_v1_small", "sparseformer_v1_base")),
        ("btsp_augreg_a", ("sparseformer_btsp_augreg_base", "sparseformer_btsp_augreg_large")),
        ("btsp_clip_a", ("sparseformer_btsp_openai_clip_base", "sparseformer_btsp_openai_clip_large")),
    ],
)
def test_published_choices_that_no_shape_shows(fixture: str, names: tuple[str, ...]) -> None:
    """Whatever is not a size is the same as in the official configuration of a small model of the family."""
    state, _, official = read_fixture(fixture)
    expected = load_official_checkpoint(state, official_config=official).config
    for name in names:
        published = SparseFormerConfig.from_name(name)
        assert {f: getattr(published, f) for f in NOT_SIZES} == {f: getattr(expected, f) for f in NOT_SIZES}
        is_v1 = published.family == "v1"
        assert published.num_attention_heads == (64 if is_v1 else published.hidden_size // 64)
        assert published.focusing_num_attention_heads == (64 if is_v1 else published.focusing_size // 64)


def test_what_a_configuration_leaves_out_has_the_official_defaults() -> None:
    state, tensors, config = read_fixture("btsp_augreg_a")
    for key in ("type_num_attn_heads", "ln_eps", "clip_quick_gelu", "grid_sample_config", "mixing_bias"):
        del config["compatible_config"][key]
    model = load_official_checkpoint(state, official_config=config)
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["input"]).pooler_output, tensors["output"], rtol=0, atol=1e-4)
