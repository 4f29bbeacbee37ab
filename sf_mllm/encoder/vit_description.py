"""What a student needs from a ViT teacher, whatever library it comes from: sizes, weights, pooling, class names.

Teachers are recognised by their attributes. What a cortex block cannot hold is refused: a block that computes something
else would be inherited silently wrong.
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


@dataclass(frozen=True)
class Inherited:
    """One tensor in the layout of the student; `sources` are the teacher's parameters it is made of, or ZEROS."""

    sources: tuple[str, ...]
    tensor: Tensor


@dataclass(frozen=True)
class VitDescription:
    """What a student needs to know of its teacher.

    Attributes:
        width, depth, num_heads, intermediate_size, hidden_act, layer_norm_eps: of the teacher's blocks.
        pooling: as in `SparseFormerConfig`.
        blocks: for each block of the teacher, weights by the names they have in a `CortexBlock`.
        head: weights of the final norm, the attention pool and the projection, as far as the teacher has them, by their
            names in `SparseFormerModel`.
        class_token: [1, D] as it enters the first block, or None where the student needs none.
        class_names: what a classifier tells apart, in the order of its logits; None if its output is an embedding.
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
    class_names: list[str] | None
    parameter_names: list[str]


def read_layer(name: str, source: str, layer: Any, scale: tuple[str, Tensor] | None = None) -> dict[str, Inherited]:
    """Read weight and bias of a linear layer or a norm.

    Args:
        name: of the layer in the student.
        source: of the layer in the teacher.
        layer: the teacher's layer.
        scale: name and [D] of a layer scale behind it, which is folded in.

    Raises:
        InputError: the layer is neither of both.
    """
    if not isinstance(layer, nn.Linear | nn.LayerNorm):
        raise InputError(f"Teacher layer {source} is a {type(layer).__name__}; a SparseFormer has Linear or LayerNorm.")
    weight = Inherited((f"{source}.weight",), layer.weight.detach())
    bias = read_bias(f"{source}.bias", layer.bias, layer.weight)
    if scale is not None:
        scale_name, gamma = scale[0], scale[1].detach()
        weight = Inherited((*weight.sources, scale_name), weight.tensor * gamma[:, None])
        bias = Inherited(bias.sources if bias.sources == (ZEROS,) else (*bias.sources, scale_name), bias.tensor * gamma)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def read_bias(source: str, bias: Tensor | None, weight: Tensor) -> Inherited:
    """Bias of a layer with this weight; zeros where the teacher has none, since cortex blocks always have one."""
    if bias is None:
        return Inherited((ZEROS,), weight.new_zeros(weight.shape[0]))
    return Inherited((source,), bias.detach())


def read_activation(activation: nn.Module) -> str:
    """Name of an activation in transformers' `ACT2FN`.

    Raises:
        InputError: it has none here.
    """
    kind = type(activation).__name__
    if kind not in ACTIVATION_NAMES:
        raise InputError(
            f"This teacher's activation {kind} is not supported; allowed: {', '.join(sorted(ACTIVATION_NAMES))}."
        )
    if getattr(activation, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    return ACTIVATION_NAMES[kind]


def read_same_eps(norms: list[Any]) -> float:
    """Read the epsilon that all norms share.

    Raises:
        InputError: they do not.
    """
    values = {norm.eps for norm in norms}
    if len(values) != 1:
        raise InputError(f"This teacher's norms have different epsilons ({sorted(values)}); a SparseFormer has one.")
    return values.pop()


def refuse_unread_parameters(prefix: str, part: nn.Module, weights: dict[str, Inherited]) -> None:
    """Raise if a part of the teacher has parameters that were not taken: it computes something else.

    Args:
        prefix: of the part's parameters in the teacher.
        part: the part.
        weights: what was read from it.
    """
    read = {source for entry in weights.values() for source in entry.sources}
    unread = [name for name in parameter_names(part) if prefix + name not in read]
    if unread:
        raise InputError(f"Teacher part {prefix[:-1]} has {', '.join(unread)}, for which a SparseFormer has no place.")


def parameter_names(module: nn.Module) -> list[str]:
    """Names of all parameters."""
    return [name for name, _ in module.named_parameters()]
