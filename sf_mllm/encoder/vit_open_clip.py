"""Describe the ViT of an open_clip model in open_clip's own layout."""

from typing import Any

from torch import nn

from sf_mllm.encoder.vit_description import (
    Inherited,
    VitDescription,
    parameter_names,
    read_activation,
    read_bias,
    read_layer,
    read_same_eps,
    refuse_unread_parameters,
)
from sf_mllm.errors import InputError


def describe_open_clip(visual: Any) -> VitDescription:
    """Read the sizes and weights of open_clip's own `VisionTransformer`.

    Raises:
        InputError: it has a part that cannot be inherited; the part is named.
    """
    if visual.attn_pool is not None:
        raise InputError(
            f"This teacher pools with CoCa's {type(visual.attn_pool).__name__}, whose queries have a width and a norm "
            "of their own; a SparseFormer pools by class token, mean or the attention pool of SigLIP."
        )
    pooling = {
        ("tok", False): "cls",
        ("tok", True): "cls",
        ("avg", False): "norm_then_mean",
        ("avg", True): "mean_then_norm",
    }.get((visual.pool_type, bool(visual.final_ln_after_pool)))
    if pooling is None:
        raise InputError(f"This teacher's pooling '{visual.pool_type}' is not supported; allowed: tok, avg.")
    blocks = [
        _read_block(f"transformer.resblocks.{index}.", block)
        for index, block in enumerate(visual.transformer.resblocks)
    ]
    head = read_layer("norm", "ln_post", visual.ln_post)
    if visual.proj is not None:
        head["projection.weight"] = Inherited(("proj",), visual.proj.t())
    class_token = None
    if pooling == "cls":
        token = visual.ln_pre(visual.class_embedding + visual.positional_embedding[0])
        class_token = Inherited(("class_embedding",), token[None])
    block = visual.transformer.resblocks[0]
    return VitDescription(
        width=block.ln_1.weight.shape[0],
        depth=len(blocks),
        num_heads=block.attn.num_heads,
        intermediate_size=block.mlp.c_fc.out_features,
        hidden_act=read_activation(block.mlp.gelu),
        layer_norm_eps=read_same_eps(
            [visual.ln_post, *(norm for b in visual.transformer.resblocks for norm in (b.ln_1, b.ln_2))]
        ),
        pooling=pooling,
        blocks=blocks,
        head=head,
        class_token=class_token,
        class_names=None,
        parameter_names=parameter_names(visual),
    )


def _read_block(prefix: str, block: Any) -> dict[str, Inherited]:
    if not isinstance(block.attn, nn.MultiheadAttention):
        raise InputError(
            f"Teacher block {prefix[:-1]} has attention of type {type(block.attn).__name__}; "
            "only plain multi-head attention can be inherited."
        )
    attention = block.attn
    scale_1, scale_2 = (
        (f"{prefix}{name}.gamma", getattr(block, name).gamma) if hasattr(getattr(block, name), "gamma") else None
        for name in ("ls_1", "ls_2")
    )
    weights = {
        **read_layer("norm1", f"{prefix}ln_1", block.ln_1),
        "attn.qkv.weight": Inherited((f"{prefix}attn.in_proj_weight",), attention.in_proj_weight),
        "attn.qkv.bias": read_bias(f"{prefix}attn.in_proj_bias", attention.in_proj_bias, attention.in_proj_weight),
        **read_layer("attn.proj", f"{prefix}attn.out_proj", attention.out_proj, scale_1),
        **read_layer("norm2", f"{prefix}ln_2", block.ln_2),
        **read_layer("mlp.fc1", f"{prefix}mlp.c_fc", block.mlp.c_fc),
        **read_layer("mlp.fc2", f"{prefix}mlp.c_proj", block.mlp.c_proj, scale_2),
    }
    refuse_unread_parameters(prefix, block, weights)
    return weights
