"""Inherit the last blocks, the final norm and the projection of a ViT: what fits, what is new, what is left out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.vit_description import VitDescription
from sf_mllm.errors import InputError, nearest

if TYPE_CHECKING:
    from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel


@dataclass
class InheritanceReport:
    """What became of every tensor.

    Attributes:
        copied: student parameter -> teacher parameter, or "zeros" for a bias that the teacher lacks.
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


def config_for_vit(teacher: VitDescription, overrides: dict[str, Any]) -> SparseFormerConfig:
    """Return the student's configuration.

    Sizes follow the published models: the last two thirds of the blocks are inherited, the focusing stage is half as
    wide, 63 latent tokens from a width of 1024 on and 48 below.

    Raises:
        InputError: an override is no field of the configuration, is no value for it, or contradicts inherited weights.
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
    try:
        return SparseFormerConfig(**sizes)
    except StrictDataclassError as error:  # the check of types and choices, on several lines
        raise InputError(f"The student cannot have these settings: {' '.join(str(error).split())}.") from error


@torch.no_grad()
def inherit_weights(
    model: SparseFormerModel, teacher: VitDescription, *, start_from_class_token: bool
) -> InheritanceReport:
    """Copy the teacher's weights into a student of fitting size.

    Args:
        model: student made from `config_for_vit`.
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


def _heads_for(width: int) -> int:
    """Heads nearest to the published width of 64 each, among the divisors of the width."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: (abs(heads - width / 64), -heads))
