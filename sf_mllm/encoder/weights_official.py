"""Read the published SparseFormer checkpoints (showlab/sparseformer, `*_converted.pth`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.published import PUBLISHED
from sf_mllm.encoder.strict_loading import list_some
from sf_mllm.errors import InputError, first_line, nearest

V1_OPERATIONS = ("ATTN", "ROI_ADJ", "SAMPLING_M", "MLP")
FOCUSING_OPERATIONS = ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ")
SAMPLING_OPERATIONS = ("SAMPLING_M", "PE_INJECT")
CORTEX_OPERATIONS = ("ATTN", "MLP")
# What the official code assumes where `compatible_config` is silent and shapes do not tell.
OFFICIAL_DEFAULTS: dict[str, Any] = {
    "type_num_attn_heads": 2,
    "pg_inner_dim": 0.25,
    "ln_eps": 1e-5,
    "clip_quick_gelu": False,
    "grid_sample_config": {},
}

# Beginnings of names, official -> ours.
TOP_NAMES = {
    "feat_extractor.conv1.": "stem.conv.",
    "initial_roi.weight": "initial.rois",
    "initial_embedding.weight": "initial.embedding",
    "cls_embedding.weight": "cls_token",
    "layers.0.stage_embedding.weight": "focusing.stage_embedding",
    "norm.": "norm.",
    "proj.": "projection.",
}
UNIT_NAMES = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.": "attn.",
    "mlp.": "mlp.",
    "roi_offset_bias": "sampler.shared_offsets",
    "roi_offset_module.0.": "sampler.norm.",
    "roi_offset_module.1.": "sampler.offsets.",
    "adaptive_mixing.parameter_generator.0.": "mixing.norm.",
    "adaptive_mixing.parameter_generator.1.": "mixing.squeeze.",
    "adaptive_mixing.parameter_generator.2.": "mixing.generate.",
    "adaptive_mixing.out_proj.": "mixing.out.",
    "adaptive_mixing.m_beta": "mixing.channel_bias",
    "adaptive_mixing.s_beta": "mixing.point_bias",
    "roi_adjust_module.0.": "roi_adjustment.norm.",
    "pe_transition.0.": "roi_code.norm.",
    "pe_transition.1.": "roi_code.linear.",
}
FAMILY_UNIT_NAMES = {
    "v1": {"roi_adjust_module.1.": "roi_adjustment.out."},
    "bootstrapped": {"roi_adjust_module.1.": "roi_adjustment.hidden.", "roi_adjust_module.3.": "roi_adjustment.out."},
}
FAMILY_TRANSITION_NAMES = {"v1": {"0.": "0.", "1.": "1."}, "bootstrapped": {"0.": ""}}


def load_official_checkpoint(
    path_or_state_dict: str | Path | dict[str, Any], official_config: dict[str, Any] | None = None
) -> SparseFormerModel:
    """Turn an official checkpoint into a `SparseFormerModel`.

    Args:
        path_or_state_dict: a `.pth` file (bare or wrapped in {"model": ...}; read with `weights_only`), a
            `.safetensors` file, or a state dict.
        official_config: configuration in the official form (`num_latent_tokens`, `width_configs`, `ops_list`,
            `compatible_config`, ...). Without it, the published configuration of the file's name is taken, or the one
            whose shapes the weights have.

    Returns:
        The model in fp32, in eval mode.

    Raises:
        InputError: the file cannot be read, no configuration is known for it, or keys are missing, left over or of
            another shape (named).
    """
    state = _read_state(path_or_state_dict)
    if official_config is not None:
        config = config_from_official(official_config, state)
    else:
        config = _published_config(path_or_state_dict, state)
    weights, left_over = rename_official_state(state, config)
    with torch.device("meta"):
        model = SparseFormerModel(config)
    _check_strictly(model, weights, left_over)
    # Copied, not assigned: a model that trains must not change the caller's tensors.
    model.to_empty(device="cpu").load_state_dict(weights, strict=True)
    return model.eval()


def config_from_official(official: dict[str, Any], state: dict[str, Tensor]) -> SparseFormerConfig:
    """Translate a configuration in the official form; sizes that the weights show are taken from the weights.

    Args:
        official: see `load_official_checkpoint`.
        state: official state dict.

    Raises:
        InputError: a needed key is missing, or the configuration describes a layout that neither family has.
    """
    try:
        compatible = {**OFFICIAL_DEFAULTS, **official["compatible_config"]}
        widths, repeats = list(official["width_configs"]), list(official["repeats"])
        operations = [tuple(str(operation) for operation in unit) for unit in official["ops_list"]]
        num_latents = official["num_latent_tokens"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"official_config lacks {error}; it needs num_latent_tokens, width_configs, repeats, ops_list and "
            "compatible_config, as the official configurations have them."
        ) from error
    family = _family(operations)
    if not len(widths) == len(repeats) == len(operations) or len(set(widths[1:])) != 1 or set(repeats[1:]) != {1}:
        raise InputError(
            f"official_config has widths {widths} and repeats {repeats}; allowed are one entry per unit, one width "
            "from the second unit on, and repeats of the first unit only."
        )
    narrow, wide = int(widths[0]), int(widths[1])
    sampling = {
        "mode": "bilinear",
        "align_corners": False,
        "padding_mode": "border",
        **compatible["grid_sample_config"],
    }
    if sampling["mode"] != "bilinear" or sampling["align_corners"]:
        raise InputError(f"grid_sample_config {sampling} is not supported; bilinear without aligned corners is.")
    cls_unit = official.get("cls_token_insert_layer", -1)
    if cls_unit not in (-1, 2):
        raise InputError(f"cls_token_insert_layer={cls_unit} is not supported; -1 (none) and 2 are.")
    expected_switches: dict[str, Any] = {
        "type_op_adjust": 1 if family == "v1" else 2,
        "mixing_bias": family == "v1",
        "transition_ln": family == "v1",
        "use_stage_embedding": family == "bootstrapped",
    }
    for switch, expected in expected_switches.items():
        if compatible.get(switch, expected) != expected:
            raise InputError(f"{switch}={compatible[switch]} does not belong to the {family} family ({expected}).")

    def mixing_size(width: int) -> int:
        inner = compatible["pg_inner_dim"]
        return int(inner * width) if isinstance(inner, float) else int(inner)

    def heads(width: int) -> int:
        return 64 if compatible["type_num_attn_heads"] == 1 else width // 64

    activation = "quick_gelu" if compatible["clip_quick_gelu"] else "gelu"
    projection = _get(state, "proj.weight")
    return SparseFormerConfig(
        family=family,
        stem_channels=len(_get(state, "feat_extractor.conv1.weight")),
        num_latents=int(num_latents),
        shared_latent_embedding=len(_get(state, "initial_embedding.weight")) == 1,
        initial_roi_layout="official_grid" if num_latents >= 4 else "distinct_grid",
        focusing_size=narrow,
        focusing_repeats=int(repeats[0]),
        focusing_num_attention_heads=heads(narrow),
        # The official rule is "units that are not repeated"; it reaches the focusing block only where that runs once.
        focusing_hidden_act=activation if repeats[0] == 1 else "gelu",
        focusing_layer_norm_eps=compatible["ln_eps"],
        num_sampling_points=_get(state, "layers.0.roi_offset_bias").numel() // 2,
        focusing_mixing_size=mixing_size(narrow),
        sampling_mixing_size=mixing_size(wide),
        padding_mode=sampling["padding_mode"],
        hidden_size=wide,
        num_hidden_layers=len(operations) - 2,
        num_attention_heads=heads(wide),
        intermediate_size=4 * wide,
        hidden_act=activation,
        layer_norm_eps=compatible["ln_eps"],
        use_cls_token=cls_unit == 2,
        pooling="cls" if official.get("head_op", "cls" if cls_unit == 2 else "avg") == "cls" else "mean_then_norm",
        projection_size=len(projection),
        projection_bias="proj.bias" in state,
    )


def rename_official_state(state: dict[str, Tensor], config: SparseFormerConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Give official weights our names and layout (fp32), and list the official keys that have no counterpart."""
    # A transition stands in the official list of layers only where the width changes.
    has_transition = config.focusing_size != config.hidden_size
    wide = 2 if has_transition else 1
    unit_names = {**UNIT_NAMES, **FAMILY_UNIT_NAMES[config.family]}
    units = {"layers.0.": ("focusing.narrow.", unit_names), f"layers.{wide}.": ("focusing.wide.", unit_names)}
    if has_transition:
        units["layers.1."] = ("focusing.transition.", FAMILY_TRANSITION_NAMES[config.family])
    for block in range(config.num_hidden_layers):
        units[f"layers.{wide + 1 + block}."] = (f"cortex.{block}.", unit_names)

    weights: dict[str, Tensor] = {}
    left_over = []
    for key, tensor in state.items():
        name = _replace_beginning(key, TOP_NAMES)
        unit = re.match(r"layers\.\d+\.", key)
        if name is None and unit and unit.group() in units:
            prefix, names = units[unit.group()]
            inner = _replace_beginning(key[unit.end() :], names)
            name = None if inner is None else prefix + inner
        if name is None:
            left_over.append(key)
        elif name.endswith("sampler.shared_offsets"):
            weights[name] = tensor.float().reshape(-1, 2)
        else:
            weights[name] = tensor.float()
    return weights, left_over


def _check_strictly(model: SparseFormerModel, weights: dict[str, Tensor], left_over: list[str]) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    if "focusing.stage_embedding" in missing:
        raise InputError(
            "The checkpoint lacks layers.0.stage_embedding.weight, which the official renaming helper deletes; "
            "without it the model is not the published one: convert the original file again and keep that key."
        )
    if missing:
        raise InputError(f"The checkpoint lacks weights for {list_some(missing)}.")
    extra = left_over + [name for name in weights if name not in expected]
    if extra:
        raise InputError(f"The checkpoint has keys that this model lacks: {list_some(extra)}.")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"The checkpoint's weight for {name} has shape {tuple(weights[name].shape)}, "
                f"but this configuration needs {tuple(tensor.shape)}."
            )


def _read_state(source: str | Path | dict[str, Any]) -> dict[str, Tensor]:
    if isinstance(source, dict):
        state = source
    else:
        path = Path(source)
        if not path.is_file():
            raise InputError(f"Checkpoint '{path}' does not exist; give a .pth or .safetensors file.")
        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise InputError(f"Checkpoint '{path}' is damaged or no checkpoint: {first_line(error)}.") from error
        except Exception as error:  # pickle's own errors have no common base
            # PyTorch's own message goes on to explain how to load the file all the same.
            raise InputError(
                f"Checkpoint '{path}' holds more than tensors, which could run code, and is not loaded; "
                "save its state dict alone."
            ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError('A checkpoint must be a state dict of tensors, or {"model": state dict}.')
    return state


def _published_config(source: str | Path | dict[str, Any], state: dict[str, Tensor]) -> SparseFormerConfig:
    if not isinstance(source, dict):
        name = Path(source).stem.removesuffix("_converted")
        if name in PUBLISHED:
            return SparseFormerConfig.from_name(name)
    for name in PUBLISHED:
        if _has_shapes_of(state, SparseFormerConfig.from_name(name)):
            return SparseFormerConfig.from_name(name)
    hint = "" if isinstance(source, dict) else nearest(Path(source).stem, PUBLISHED)
    raise InputError(
        "Neither the name nor the shapes of this checkpoint belong to a published SparseFormer; pass official_config, "
        f"since heads, epsilons and activation cannot be read from shapes.{hint}"
    )


def _has_shapes_of(state: dict[str, Tensor], config: SparseFormerConfig) -> bool:
    weights, left_over = rename_official_state(state, config)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in SparseFormerModel(config).state_dict().items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    # A file without the stage embedding is recognised here, so that the strict check can say what it lacks.
    return (
        not left_over
        and {**expected, **given} == expected
        and expected.keys() - given.keys() <= {"focusing.stage_embedding"}
    )


def _family(operations: list[tuple[str, ...]]) -> Literal["bootstrapped", "v1"]:
    layouts: dict[Literal["bootstrapped", "v1"], tuple] = {
        "v1": (V1_OPERATIONS, V1_OPERATIONS),
        "bootstrapped": (FOCUSING_OPERATIONS, SAMPLING_OPERATIONS),
    }
    for family, layout in layouts.items():
        if len(operations) > 2 and tuple(operations[:2]) == layout and set(operations[2:]) == {CORTEX_OPERATIONS}:
            return family
    raise InputError(f"ops_list {operations} is the layout of neither family; see the published configurations.")


def _replace_beginning(key: str, names: dict[str, str]) -> str | None:
    for theirs, ours in names.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return None


def _get(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise InputError(f"The checkpoint lacks {key}, which every SparseFormer has.")
    return state[key]
