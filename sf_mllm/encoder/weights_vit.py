"""Inherit the last blocks, the final norm and the projection of a ViT: what fits, what is new, what is left out.

Teachers are recognised by their attributes, so that neither open_clip nor timm is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.errors import InputError, nearest

if TYPE_CHECKING:
    from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel

ACTIVATION_NAMES = {
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "SiLU": "silu",
    "ReLU": "relu",
}


@dataclass(frozen=True)
class Inherited:
    """One tensor of the teacher, in the layout of the student; `source` is its name in the teacher."""

    source: str
    tensor: Tensor


@dataclass(frozen=True)
class VitDescription:
    """What a student needs to know of its teacher, whatever library the teacher comes from.

    Attributes:
        width, depth, num_heads, intermediate_size, hidden_act, layer_norm_eps: of the teacher's blocks.
        pooling: as in `SparseFormerConfig`.
        blocks: for each block of the teacher, weights by the names they have in a `CortexBlock`.
        head: weights of the final norm and the projection by their names in `SparseFormerModel`.
        class_token: [1, D] as it enters the first block, or None where the student needs none.
        parameter_names: all parameters of the teacher's image tower.
    """

    width: int
    depth: int
    num_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    pooling: str
    blocks: list[dict[str, Inherited]]
    head: dict[str, Inherited]
    class_token: Inherited | None
    parameter_names: list[str]


@dataclass
class InheritanceReport:
    """What became of every tensor.

    Attributes:
        copied: student parameter -> teacher parameter.
        new: student parameters that start from their own initialisation.
        left_out: teacher parameters that have no place in the student.
        first_block: index of the teacher block that became cortex block 0.
    """

    copied: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    first_block: int = 0

    def __str__(self) -> str:
        groups = sorted({name.split(".")[0] for name in self.new})
        return (
            f"copied {len(self.copied)} tensors (teacher blocks from {self.first_block}, final norm, projection); "
            f"new: {len(self.new)} tensors in {', '.join(groups)}; left out of the teacher: {len(self.left_out)}"
        )


def describe_vit(teacher: nn.Module) -> VitDescription:
    """Read the sizes and weights of a teacher.

    Args:
        teacher: an open_clip CLIP model, its `visual`, or a timm `VisionTransformer`.

    Raises:
        InputError: the teacher is no ViT, or has a part that a cortex block cannot hold; the part is named.
    """
    visual = getattr(teacher, "visual", teacher)
    if hasattr(visual, "transformer") and hasattr(visual.transformer, "resblocks"):
        return _describe_open_clip(visual)
    if hasattr(visual, "trunk") and hasattr(visual, "head"):
        return _describe_timm(visual.trunk, prefix="trunk.", head=visual.head, names=_names(visual))
    if hasattr(visual, "blocks") and hasattr(visual, "patch_embed"):
        return _describe_timm(visual, prefix="", head=visual.head, names=_names(visual))
    raise InputError(
        f"A teacher must be an open_clip CLIP with a ViT image tower or a timm VisionTransformer, "
        f"got {type(teacher).__name__} with an image tower of type {type(visual).__name__}."
    )


def size_for_vit(teacher: VitDescription, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the student's configuration.

    Sizes follow the published models: the last two thirds of the blocks are inherited, the focusing stage is half as
    wide, 63 latent tokens from a width of 1024 on and 48 below.

    Raises:
        InputError: an override is no field of the configuration, or contradicts inherited weights.
    """
    valid = {entry.name for entry in fields(SparseFormerConfig)}
    inherited: dict[str, Any] = {
        "family": "bootstrapped",
        "hidden_size": teacher.width,
        "num_attention_heads": teacher.num_heads,
        "intermediate_size": teacher.intermediate_size,
        "hidden_act": teacher.hidden_act,
        "layer_norm_eps": teacher.layer_norm_eps,
        "pooling": teacher.pooling,
        "use_cls_token": teacher.class_token is not None,
        "projection_size": len(teacher.head["projection.weight"].tensor)
        if "projection.weight" in teacher.head
        else None,
        "projection_bias": "projection.bias" in teacher.head,
    }
    for name, value in overrides.items():
        if name not in valid:
            raise InputError(f"The student has no setting '{name}'.{nearest(name, valid)}")
        if name in inherited and inherited[name] != value:
            raise InputError(f"{name} follows the teacher ({inherited[name]}); it cannot be set to {value}.")
    focusing_size = overrides.get("focusing_size", max(8, teacher.width // 2 // 8 * 8))
    free = {
        "num_latents": 63 if teacher.width >= 1024 else 48,
        "num_hidden_layers": max(1, round(teacher.depth * 2 / 3)),
        "focusing_size": focusing_size,
        "focusing_num_attention_heads": _heads_for(focusing_size),
    }
    sizes = {**free, **overrides, **inherited}
    if sizes["num_hidden_layers"] > teacher.depth:
        raise InputError(
            f"num_hidden_layers={sizes['num_hidden_layers']} is more than the teacher's {teacher.depth} blocks."
        )
    return sizes


@torch.no_grad()
def inherit_weights(
    model: SparseFormerModel, teacher: VitDescription, *, start_from_class_token: bool
) -> InheritanceReport:
    """Copy the teacher's weights into a student of fitting size.

    Args:
        model: student made from `size_for_vit`.
        teacher: described teacher.
        start_from_class_token: copy the class token too.
    """
    first_block = teacher.depth - len(model.cortex)
    weights = {
        f"cortex.{index}.{name}": entry
        for index, block in enumerate(teacher.blocks[first_block:])
        for name, entry in block.items()
    }
    weights.update(teacher.head)
    if teacher.class_token is not None and start_from_class_token:
        weights["cls_token"] = teacher.class_token
    parameters = dict(model.named_parameters())
    for name, entry in weights.items():
        if parameters[name].shape != entry.tensor.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(parameters[name].shape)}, {entry.source} {tuple(entry.tensor.shape)}."
            )
        parameters[name].copy_(entry.tensor)
    used = {entry.source for entry in weights.values()}
    return InheritanceReport(
        copied={name: entry.source for name, entry in weights.items()},
        new=[name for name in parameters if name not in weights],
        left_out=[name for name in teacher.parameter_names if name not in used],
        first_block=first_block,
    )


def _describe_open_clip(visual: Any) -> VitDescription:
    if getattr(visual, "attn_pool", None) is not None:
        raise InputError("This teacher pools with attention; a SparseFormer pools by class token or mean.")
    pooling = {
        ("tok", False): "cls",
        ("tok", True): "cls",
        ("avg", False): "norm_then_mean",
        ("avg", True): "mean_then_norm",
    }.get((visual.pool_type, bool(visual.final_ln_after_pool)))
    if pooling is None:
        raise InputError(f"This teacher's pooling '{visual.pool_type}' is not supported; allowed: tok, avg.")
    blocks = [
        _open_clip_block(f"transformer.resblocks.{index}.", block)
        for index, block in enumerate(visual.transformer.resblocks)
    ]
    head = _layer("norm", "ln_post", visual.ln_post)
    if visual.proj is not None:
        head["projection.weight"] = Inherited("proj", visual.proj.t())
    class_token = None
    if pooling == "cls":
        token = visual.ln_pre(visual.class_embedding + visual.positional_embedding[0])
        class_token = Inherited("class_embedding", token[None])
    block = visual.transformer.resblocks[0]
    return VitDescription(
        width=block.ln_1.weight.shape[0],
        depth=len(blocks),
        num_heads=block.attn.num_heads,
        intermediate_size=block.mlp.c_fc.out_features,
        hidden_act=_activation_name(block.mlp.gelu),
        layer_norm_eps=_same_eps([visual.ln_post, *(b.ln_1 for b in visual.transformer.resblocks)]),
        pooling=pooling,
        blocks=blocks,
        head=head,
        class_token=class_token,
        parameter_names=_names(visual),
    )


def _open_clip_block(prefix: str, block: Any) -> dict[str, Inherited]:
    if not isinstance(block.attn, nn.MultiheadAttention):
        raise InputError(
            f"Teacher block {prefix} has attention of type {type(block.attn).__name__}; "
            "only plain multi-head attention can be inherited."
        )
    attention = block.attn
    return {
        **_layer("norm1", f"{prefix}ln_1", block.ln_1),
        "attn.qkv.weight": Inherited(f"{prefix}attn.in_proj_weight", attention.in_proj_weight),
        "attn.qkv.bias": Inherited(
            f"{prefix}attn.in_proj_bias", _or_zeros(attention.in_proj_bias, attention.in_proj_weight)
        ),
        **_layer("attn.proj", f"{prefix}attn.out_proj", attention.out_proj, scale=block.ls_1),
        **_layer("norm2", f"{prefix}ln_2", block.ln_2),
        **_layer("mlp.fc1", f"{prefix}mlp.c_fc", block.mlp.c_fc),
        **_layer("mlp.fc2", f"{prefix}mlp.c_proj", block.mlp.c_proj, scale=block.ls_2),
    }


def _describe_timm(vit: Any, prefix: str, head: Any, names: list[str]) -> VitDescription:
    if not hasattr(vit, "blocks") or not hasattr(vit, "global_pool"):
        raise InputError(f"This timm teacher is a {type(vit).__name__}; only VisionTransformer can be inherited.")
    if getattr(vit, "attn_pool", None) is not None:
        raise InputError("This teacher pools with attention; a SparseFormer pools by class token or mean.")
    if getattr(vit, "rope", None) is not None:
        raise InputError("This teacher rotates queries and keys by position; its blocks do not work without positions.")
    final_norms = {
        name: norm for name, norm in (("norm", vit.norm), ("fc_norm", vit.fc_norm)) if not isinstance(norm, nn.Identity)
    }
    if len(final_norms) != 1:
        raise InputError(f"This teacher has {len(final_norms)} final norms; a SparseFormer has exactly one.")
    norm_name, norm = final_norms.popitem()
    pooling = {
        ("token", "norm"): "cls",
        ("token", "fc_norm"): "cls",
        ("avg", "norm"): "norm_then_mean",
        ("avg", "fc_norm"): "mean_then_norm",
    }.get((vit.global_pool, norm_name))
    if pooling is None:
        raise InputError(f"This teacher's pooling '{vit.global_pool}' is not supported; allowed: token, avg.")
    blocks = [_timm_block(f"{prefix}blocks.{index}.", block) for index, block in enumerate(vit.blocks)]
    layers = _layer("norm", prefix + norm_name, norm)
    projections = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    if len(projections) > 1:
        raise InputError("This teacher's head has several linear layers; only one projection can be inherited.")
    for name, projection in projections:
        layers.update(_layer("projection", f"{'head.' if name else 'head'}{name}", projection))
    class_token = None
    if pooling == "cls":
        token = vit.cls_token[0]
        if vit.pos_embed is not None and not vit.no_embed_class:
            token = token + vit.pos_embed[0, :1]
        class_token = Inherited(f"{prefix}cls_token", vit.norm_pre(token))
    block = vit.blocks[0]
    return VitDescription(
        width=block.norm1.weight.shape[0],
        depth=len(blocks),
        num_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act=_activation_name(block.mlp.act),
        layer_norm_eps=_same_eps([norm, *(b.norm1 for b in vit.blocks)]),
        pooling=pooling,
        blocks=blocks,
        head=layers,
        class_token=class_token,
        parameter_names=names,
    )


def _timm_block(prefix: str, block: Any) -> dict[str, Inherited]:
    if type(block).__name__ != "Block" or not hasattr(block.attn, "qkv") or not hasattr(block.mlp, "fc2"):
        raise InputError(
            f"Teacher block {prefix} is a {type(block).__name__}; only timm's plain Block can be inherited."
        )
    extra_norms = [
        name
        for part in ("attn", "mlp")
        for name in ("q_norm", "k_norm", "norm")
        if not isinstance(getattr(getattr(block, part), name, nn.Identity()), nn.Identity)
    ]
    if extra_norms:
        raise InputError(f"Teacher block {prefix} has extra norms ({', '.join(extra_norms)}), a cortex block has none.")
    return {
        **_layer("norm1", f"{prefix}norm1", block.norm1),
        **_layer("attn.qkv", f"{prefix}attn.qkv", block.attn.qkv),
        **_layer("attn.proj", f"{prefix}attn.proj", block.attn.proj, scale=block.ls1),
        **_layer("norm2", f"{prefix}norm2", block.norm2),
        **_layer("mlp.fc1", f"{prefix}mlp.fc1", block.mlp.fc1),
        **_layer("mlp.fc2", f"{prefix}mlp.fc2", block.mlp.fc2, scale=block.ls2),
    }


def _layer(name: str, source: str, layer: Any, scale: Any = None) -> dict[str, Inherited]:
    """Weight and bias of a linear layer or a norm; a layer scale behind it is folded in."""
    weight, bias = layer.weight, _or_zeros(layer.bias, layer.weight)
    gamma = getattr(scale, "gamma", None)
    if gamma is not None:
        weight, bias = weight * gamma[:, None], bias * gamma
    return {
        f"{name}.weight": Inherited(f"{source}.weight", weight.detach()),
        f"{name}.bias": Inherited(f"{source}.bias", bias.detach()),
    }


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _activation_name(activation: nn.Module) -> str:
    kind = type(activation).__name__
    if kind not in ACTIVATION_NAMES:
        raise InputError(
            f"This teacher's activation {kind} is not supported; allowed: {', '.join(sorted(ACTIVATION_NAMES))}."
        )
    if getattr(activation, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return ACTIVATION_NAMES[kind]


def _same_eps(norms: list[Any]) -> float:
    values = {norm.eps for norm in norms}
    if len(values) != 1:
        raise InputError(f"This teacher's norms have different epsilons ({sorted(values)}); a SparseFormer has one.")
    return values.pop()


def _heads_for(width: int) -> int:
    """Heads nearest to the published width of 64 each, among the divisors of the width."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: (abs(heads - width / 64), -heads))
