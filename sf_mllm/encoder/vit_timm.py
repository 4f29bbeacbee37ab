"""Describe a timm ViT, alone or inside open_clip's wrapper of timm models."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sf_mllm.encoder.vit_description import (
    Inherited,
    VitDescription,
    parameter_names,
    read_activation,
    read_layer,
    read_same_eps,
    refuse_unread_parameters,
)
from sf_mllm.errors import InputError

_VIT_PARTS = ("blocks", "global_pool", "norm", "fc_norm", "norm_pre", "pos_embed", "head")
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.act")
# Blocks whose parts run in the order of a cortex block; ResPostBlock, for one, has the same parts in another order.
_BLOCK_KINDS = ("Block", "EvaBlock")


def describe_timm(visual: Any) -> VitDescription:
    """Read the sizes and weights of a timm `VisionTransformer` or `Eva`, or of open_clip's wrapper around one.

    Raises:
        InputError: it is none of these, or has a part that cannot be inherited; the part is named.
    """
    prefix = "trunk." if hasattr(visual, "trunk") else ""
    vit = visual.trunk if prefix else visual
    kind = type(vit).__name__
    if not all(hasattr(vit, part) for part in _VIT_PARTS):
        raise InputError(f"This timm teacher is a {kind}; only plain VisionTransformer models can be inherited.")
    if hasattr(vit, "head_dist"):
        raise InputError("This teacher has a second class token and head for distillation; a SparseFormer has one.")
    if getattr(vit, "rope", None) is not None:
        raise InputError("This teacher rotates queries and keys by position; its blocks do not work without positions.")
    blocks = [_read_block(f"{prefix}blocks.{index}.", block) for index, block in enumerate(vit.blocks)]
    block = vit.blocks[0]
    norms = [vit.norm, vit.fc_norm, *(layer for b in vit.blocks for layer in (b.norm1, b.norm2))]
    pooling, head = _read_pooling(vit, prefix)
    head |= _read_projection(visual, ("trunk.head", "head") if prefix else ("head",))
    description = VitDescription(
        width=block.norm1.weight.shape[0],
        depth=len(blocks),
        num_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act=read_activation(block.mlp.act),
        layer_norm_eps=read_same_eps([norm for norm in norms if not isinstance(norm, nn.Identity)]),
        pooling=pooling,
        blocks=blocks,
        head=head,
        class_token=_read_class_token(vit, prefix) if pooling == "cls" else None,
        class_names=None if prefix else read_class_names(vit),
        parameter_names=parameter_names(visual),
    )
    if pooling == "attention":
        _refuse_other_attention_pool(vit.attn_pool, description)
    return description


def read_class_names(vit: Any) -> list[str] | None:
    """Name the classes that a timm model's head tells apart.

    Names come from the model's own settings, else from timm's list of the ImageNet set with that many classes, else
    they are LABEL_0, LABEL_1, ... as everywhere in transformers.

    Returns:
        The names in the order of the logits, or None if the model gives an embedding: it has no head, or its head
        projects into a CLIP space.
    """
    if not isinstance(vit.head, nn.Linear):
        return None
    settings = getattr(vit, "pretrained_cfg", None) or {}
    count = vit.head.out_features
    # timm does not say which heads are CLIP projections. All of theirs are this wide, no set of classes is.
    if "clip" in settings.get("architecture", "") and count % 128 == 0:
        return None
    names = settings.get("label_names")
    if names is not None and len(names) == count:
        descriptions = settings.get("label_descriptions") or {}
        return [descriptions.get(name, name) if isinstance(descriptions, dict) else name for name in names]
    from timm.data import ImageNetInfo, infer_imagenet_subset  # the teacher is timm's, so it is there

    subset = infer_imagenet_subset({"num_classes": count}) if settings else None
    return list(ImageNetInfo(subset).label_descriptions()) if subset else [f"LABEL_{index}" for index in range(count)]


def _read_pooling(vit: Any, prefix: str) -> tuple[str, dict[str, Inherited]]:
    """How the student pools, and the weights of its final norm and its attention pool."""
    final_norms = {
        name: norm for name, norm in (("norm", vit.norm), ("fc_norm", vit.fc_norm)) if not isinstance(norm, nn.Identity)
    }
    if len(final_norms) > 1:
        raise InputError(f"This teacher has {len(final_norms)} final norms; a SparseFormer has one at most.")
    pooling = {
        ("token", "norm"): "cls",
        ("token", "fc_norm"): "cls",
        ("avg", "norm"): "norm_then_mean",
        ("avg", "fc_norm"): "mean_then_norm",
        ("map", "norm"): "attention",
    }.get((vit.global_pool, next(iter(final_norms), "norm")))
    if pooling is None:
        raise InputError(f"This teacher's pooling '{vit.global_pool}' is not supported; allowed: token, avg, map.")
    has_prefix = vit.num_prefix_tokens > 0 and getattr(vit, "pool_include_prefix", pooling == "attention")
    if pooling != "cls" and has_prefix:
        raise InputError("This teacher pools its class or register tokens with the others; a SparseFormer has none.")
    head: dict[str, Inherited] = {}
    for name, norm in final_norms.items():
        head |= read_layer("norm", prefix + name, norm)
    if pooling == "attention":
        head |= _read_attention_pool(f"{prefix}attn_pool.", vit.attn_pool)
    return pooling, head


def _read_attention_pool(prefix: str, pool: Any) -> dict[str, Inherited]:
    if pool.latent_len != 1:
        raise InputError(f"This teacher pools with {pool.latent_len} queries; the attention pool of a student has one.")
    query, sources = pool.latent[0].detach(), [f"{prefix}latent"]  # [1, D]
    if isinstance(pool.q, nn.Linear):
        query = F.linear(query, pool.q.weight.detach(), None if pool.q.bias is None else pool.q.bias.detach())
        sources += [f"{prefix}q.{name}" for name in parameter_names(pool.q)]
    weights = {
        "attention_pool.query": Inherited(tuple(sources), query),
        **read_layer("attention_pool.kv", f"{prefix}kv", pool.kv),
        **read_layer("attention_pool.proj", f"{prefix}proj", pool.proj),
        **read_layer("attention_pool.norm", f"{prefix}norm", pool.norm),
        **read_layer("attention_pool.mlp.fc1", f"{prefix}mlp.fc1", pool.mlp.fc1),
        **read_layer("attention_pool.mlp.fc2", f"{prefix}mlp.fc2", pool.mlp.fc2),
    }
    refuse_unread_parameters(prefix, pool, weights)
    return weights


def _refuse_other_attention_pool(pool: Any, blocks: VitDescription) -> None:
    """Raise unless the pool is built like the blocks, as a student's is."""
    for what, of_pool, of_blocks in (
        ("heads", pool.num_heads, blocks.num_heads),
        ("hidden units", pool.mlp.fc1.out_features, blocks.intermediate_size),
        ("as activation", read_activation(pool.mlp.act), blocks.hidden_act),
        ("as epsilon", pool.norm.eps, blocks.layer_norm_eps),
    ):
        if of_pool != of_blocks:
            raise InputError(
                f"This teacher's attention pool has {of_pool} {what}, its blocks {of_blocks}; "
                "a SparseFormer has the same in both."
            )


def _read_projection(visual: Any, heads: tuple[str, ...]) -> dict[str, Inherited]:
    """Read the one linear layer of a head; open_clip has it in the trunk's head or in its own, by the model."""
    projections = [
        f"{head}.{name}".rstrip(".")
        for head in heads
        for name, module in visual.get_submodule(head).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if len(projections) > 1:
        raise InputError("This teacher's head has several linear layers; only one projection can be inherited.")
    weights = {}
    for name in projections:
        projection = visual.get_submodule(name)
        weights["projection.weight"] = Inherited((f"{name}.weight",), projection.weight.detach())
        if projection.bias is not None:
            weights["projection.bias"] = Inherited((f"{name}.bias",), projection.bias.detach())
    return weights


def _read_class_token(vit: Any, prefix: str) -> Inherited:
    token = vit.cls_token[0]
    if vit.pos_embed is not None and not vit.no_embed_class:
        token = token + vit.pos_embed[0, :1]
    return Inherited((f"{prefix}cls_token",), vit.norm_pre(token))


def _read_block(prefix: str, block: Any) -> dict[str, Inherited]:
    name, kind = prefix[:-1], type(block).__name__
    lacking = [part for part in _BLOCK_PARTS if not _has(block, part)]
    if kind not in _BLOCK_KINDS:
        raise InputError(f"Teacher block {name} is a {kind}; only timm's plain Block and EvaBlock can be inherited.")
    if lacking:
        raise InputError(f"Teacher block {name} is a {kind} without {', '.join(lacking)}, which a cortex block has.")
    extra_norms = [
        norm
        for part in ("attn", "mlp")
        for norm in ("q_norm", "k_norm", "norm")
        if not isinstance(getattr(getattr(block, part), norm, nn.Identity()), nn.Identity)
    ]
    if extra_norms:
        raise InputError(f"Teacher block {name} has extra norms ({', '.join(extra_norms)}), a cortex block has none.")
    mlp = block.mlp
    if not (_has(mlp, "fc1") and _has(mlp, "fc2")) or mlp.fc2.in_features != mlp.fc1.out_features:
        raise InputError(f"Teacher block {name} has a gated MLP ({type(mlp).__name__}), a cortex block a plain one.")
    weights = {
        **read_layer("norm1", f"{prefix}norm1", block.norm1),
        **_read_qkv(f"{prefix}attn.", block.attn),
        **read_layer("attn.proj", f"{prefix}attn.proj", block.attn.proj, _find_scale(prefix, block, 1)),
        **read_layer("norm2", f"{prefix}norm2", block.norm2),
        **read_layer("mlp.fc1", f"{prefix}mlp.fc1", mlp.fc1),
        **read_layer("mlp.fc2", f"{prefix}mlp.fc2", mlp.fc2, _find_scale(prefix, block, 2)),
    }
    refuse_unread_parameters(prefix, block, weights)
    width = len(weights["norm1.weight"].tensor)
    if weights["attn.qkv.weight"].tensor.shape != (3 * width, width):
        raise InputError(f"Teacher block {name} has attention of another width than its tokens ({width}).")
    return weights


def _read_qkv(prefix: str, attention: Any) -> dict[str, Inherited]:
    weights = read_layer("attn.qkv", f"{prefix}qkv", attention.qkv)
    if getattr(attention, "q_bias", None) is not None:  # EVA keeps biases of queries and values; keys have none
        query_bias, value_bias = attention.q_bias.detach(), attention.v_bias.detach()
        bias = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
        weights["attn.qkv.bias"] = Inherited((f"{prefix}q_bias", f"{prefix}v_bias"), bias)
    return weights


def _find_scale(prefix: str, block: Any, branch: int) -> tuple[str, Tensor] | None:
    """Name and weight of the layer scale of a branch: a module in a Block, a parameter in an EvaBlock."""
    for name in (f"ls{branch}.gamma", f"gamma_{branch}"):
        scale = dict(block.named_parameters()).get(name)
        if scale is not None:
            return prefix + name, scale
    return None


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True
