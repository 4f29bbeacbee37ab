"""Read what a student needs from a ViT teacher: sizes, weights by their names in a cortex block, pooling.

Teachers are recognised by their attributes, so that neither open_clip nor timm is imported here. What a cortex block
cannot hold is refused: a block that computes something else would be inherited silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sf_mllm.errors import InputError

ACTIVATION_NAMES = {
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "SiLU": "silu",
    "ReLU": "relu",
}

ZEROS = "zeros"
"""Source of a bias that the teacher does not have."""
_TIMM_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2", "ls2")


@dataclass(frozen=True)
class Inherited:
    """One tensor of the teacher, in the layout of the student; `source` is its name in the teacher, or ZEROS."""

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
        return _describe_timm(visual, "trunk.")
    if hasattr(visual, "blocks") and hasattr(visual, "patch_embed"):
        return _describe_timm(visual, "")
    raise InputError(
        f"A teacher must be an open_clip CLIP with a ViT image tower or a timm VisionTransformer, "
        f"got {type(teacher).__name__} with an image tower of type {type(visual).__name__}."
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
        layer_norm_eps=_same_eps(
            [visual.ln_post, *(norm for b in visual.transformer.resblocks for norm in (b.ln_1, b.ln_2))]
        ),
        pooling=pooling,
        blocks=blocks,
        head=head,
        class_token=class_token,
        parameter_names=_names(visual),
    )


def _open_clip_block(prefix: str, block: Any) -> dict[str, Inherited]:
    if not isinstance(block.attn, nn.MultiheadAttention):
        raise InputError(
            f"Teacher block {prefix[:-1]} has attention of type {type(block.attn).__name__}; "
            "only plain multi-head attention can be inherited."
        )
    attention = block.attn
    weights = {
        **_layer("norm1", f"{prefix}ln_1", block.ln_1),
        "attn.qkv.weight": Inherited(f"{prefix}attn.in_proj_weight", attention.in_proj_weight),
        "attn.qkv.bias": _bias(f"{prefix}attn.in_proj_bias", attention.in_proj_bias, attention.in_proj_weight),
        **_layer("attn.proj", f"{prefix}attn.out_proj", attention.out_proj, scale=block.ls_1),
        **_layer("norm2", f"{prefix}ln_2", block.ln_2),
        **_layer("mlp.fc1", f"{prefix}mlp.c_fc", block.mlp.c_fc),
        **_layer("mlp.fc2", f"{prefix}mlp.c_proj", block.mlp.c_proj, scale=block.ls_2),
    }
    _refuse_unread_parameters(prefix, block, weights, ("ls_1.gamma", "ls_2.gamma"))
    return weights


def _describe_timm(visual: Any, prefix: str) -> VitDescription:
    """Describe a timm model, or open_clip's wrapper of one, in which it stands as `trunk`."""
    vit = visual.trunk if prefix else visual
    if not all(hasattr(vit, part) for part in ("blocks", "global_pool", "norm", "fc_norm", "norm_pre", "pos_embed")):
        raise InputError(f"This timm teacher is a {type(vit).__name__}; only VisionTransformer can be inherited.")
    if hasattr(vit, "head_dist"):
        raise InputError("This teacher has a second class token and head for distillation; a SparseFormer has one.")
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
    # open_clip projects with the trunk's own head or with layers behind it, depending on the model.
    heads = ("trunk.head", "head") if prefix else ("head",)
    projections = [
        f"{head}.{name}".rstrip(".")
        for head in heads
        for name, module in visual.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if len(projections) > 1:
        raise InputError("This teacher's head has several linear layers; only one projection can be inherited.")
    for name in projections:
        projection = visual.get_submodule(name)
        layers["projection.weight"] = Inherited(f"{name}.weight", projection.weight.detach())
        if projection.bias is not None:
            layers["projection.bias"] = Inherited(f"{name}.bias", projection.bias.detach())
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
        layer_norm_eps=_same_eps([norm, *(layer for b in vit.blocks for layer in (b.norm1, b.norm2))]),
        pooling=pooling,
        blocks=blocks,
        head=layers,
        class_token=class_token,
        parameter_names=_names(visual),
    )


def _timm_block(prefix: str, block: Any) -> dict[str, Inherited]:
    kind = type(block).__name__
    lacking = [name for name in _TIMM_BLOCK_PARTS if not _has(block, name)]
    # ResPostBlock has the same parts in another order.
    if kind != "Block" or lacking:
        lacks = f" without {', '.join(lacking)}" if lacking else ""
        raise InputError(f"Teacher block {prefix[:-1]} is a {kind}{lacks}; only timm's plain Block can be inherited.")
    extra_norms = [
        name
        for part in ("attn", "mlp")
        for name in ("q_norm", "k_norm", "norm")
        if not isinstance(getattr(getattr(block, part), name, nn.Identity()), nn.Identity)
    ]
    if extra_norms:
        raise InputError(
            f"Teacher block {prefix[:-1]} has extra norms ({', '.join(extra_norms)}), a cortex block has none."
        )
    if block.mlp.fc2.in_features != block.mlp.fc1.out_features:
        raise InputError(
            f"Teacher block {prefix[:-1]} has a gated MLP ({type(block.mlp).__name__}), a cortex block a plain one."
        )
    weights = {
        **_layer("norm1", f"{prefix}norm1", block.norm1),
        **_layer("attn.qkv", f"{prefix}attn.qkv", block.attn.qkv),
        **_layer("attn.proj", f"{prefix}attn.proj", block.attn.proj, scale=block.ls1),
        **_layer("norm2", f"{prefix}norm2", block.norm2),
        **_layer("mlp.fc1", f"{prefix}mlp.fc1", block.mlp.fc1),
        **_layer("mlp.fc2", f"{prefix}mlp.fc2", block.mlp.fc2, scale=block.ls2),
    }
    _refuse_unread_parameters(prefix, block, weights, ("ls1.gamma", "ls2.gamma"))
    return weights


def _refuse_unread_parameters(prefix: str, block: nn.Module, weights: dict[str, Inherited], folded: Any) -> None:
    """Raise if a block has parameters that were neither taken nor folded: it computes something else."""
    read = {entry.source for entry in weights.values()} | {prefix + name for name in folded}
    unread = [name for name in _names(block) if prefix + name not in read]
    if unread:
        raise InputError(f"Teacher block {prefix[:-1]} has {', '.join(unread)}, for which a cortex block has no place.")


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _layer(name: str, source: str, layer: Any, scale: Any = None) -> dict[str, Inherited]:
    """Weight and bias of a linear layer or a norm; a layer scale behind it is folded in."""
    if not isinstance(layer, nn.Linear | nn.LayerNorm):
        raise InputError(f"Teacher layer {source} is a {type(layer).__name__}; a SparseFormer has Linear or LayerNorm.")
    weight, bias = layer.weight.detach(), _bias(f"{source}.bias", layer.bias, layer.weight)
    gamma = getattr(scale, "gamma", None)
    if gamma is not None:
        weight, bias = weight * gamma.detach()[:, None], Inherited(bias.source, bias.tensor * gamma.detach())
    return {f"{name}.weight": Inherited(f"{source}.weight", weight), f"{name}.bias": bias}


def _bias(source: str, bias: Tensor | None, weight: Tensor) -> Inherited:
    """Bias of a layer with this weight; zeros where the teacher has none, since cortex blocks always have one."""
    return Inherited(ZEROS, weight.new_zeros(weight.shape[0])) if bias is None else Inherited(source, bias.detach())


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
