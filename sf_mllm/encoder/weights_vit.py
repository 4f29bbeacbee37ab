"""Inherit the last blocks and the head of a ViT: what fits, what is new, what is left out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.vit_description import VitDescription
from sf_mllm.encoder.vit_open_clip import describe_open_clip
from sf_mllm.encoder.vit_timm import describe_timm
from sf_mllm.errors import InputError, nearest

if TYPE_CHECKING:
    from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel


@dataclass
class InheritanceReport:
    """What became of every tensor.

    Attributes:
        copied: student parameter -> teacher parameter, several joined by " + " where they were merged into one, or
            "zeros" for a bias that the teacher lacks.
        new: student parameters that start from their own initialisation.
        left_out: teacher parameters that have no place in the student.
        first_block: index of the teacher block that became cortex block 0.
    """

    copied: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    first_block: int = 0

    def __str__(self) -> str:
        copied, new = (sorted({name.split(".")[0] for name in names}) for names in (self.copied, self.new))
        return (
            f"copied {len(self.copied)} tensors into {', '.join(copied)} (teacher blocks from {self.first_block}); "
            f"new: {len(self.new)} tensors in {', '.join(new)}; left out of the teacher: {len(self.left_out)}"
        )


def describe_vit(teacher: nn.Module) -> VitDescription:
    """Read the sizes and weights of a teacher.

    Args:
        teacher: an open_clip CLIP model, its `visual`, or a timm `VisionTransformer` or `Eva`.

    Raises:
        InputError: the teacher is no ViT, or has a part that cannot be inherited; the part is named.
    """
    visual: Any = getattr(teacher, "visual", teacher)
    if hasattr(visual, "transformer") and hasattr(visual.transformer, "resblocks"):
        return describe_open_clip(visual)
    if (hasattr(visual, "trunk") and hasattr(visual, "head")) or hasattr(visual, "blocks"):
        return describe_timm(visual)
    raise InputError(
        f"A teacher must be an open_clip CLIP with a ViT image tower or a timm VisionTransformer, "
        f"got {type(teacher).__name__} with an image tower of type {type(visual).__name__}."
    )


def config_for_vit(teacher: VitDescription, overrides: dict[str, Any]) -> SparseFormerConfig:
    """Return the student's configuration.

    Sizes follow the published models, and any of them can be overridden:

    - the last two thirds of the blocks are inherited: 8 of 12 (tiny, small, base), 16 of 24 (large), 21 of 32 (huge);
    - an image becomes 64 tokens from a width of 1024 on and 49 below. A class token is one of them, so that there are
      63 or 48 latent tokens beside it; a teacher that pools by mean or attention gives 64 or 49 latent tokens;
    - the focusing stage is half as wide as the blocks.

    A classifier's class names become `id2label`.

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
        "final_norm": "norm.weight" in teacher.head,
    }
    for name, value in overrides.items():
        if name not in valid:
            raise InputError(f"The student has no setting '{name}'.{nearest(name, valid)}")
        if name in inherited and inherited[name] != value:
            raise InputError(f"{name} follows the teacher ({inherited[name]}); it cannot be set to {value}.")
    focusing_size = overrides.get("focusing_size", max(8, teacher.width // 2 // 8 * 8))
    num_tokens = 64 if teacher.width >= 1024 else 49
    free: dict[str, Any] = {
        "num_latents": num_tokens - inherited["use_cls_token"],
        "num_hidden_layers": max(1, round(teacher.depth * 2 / 3)),
        "focusing_size": focusing_size,
        "focusing_num_attention_heads": _heads_for(focusing_size),
    }
    if teacher.class_names is not None:
        free["id2label"] = dict(enumerate(teacher.class_names))
        # Some names stand for two classes (ImageNet has two cranes); then there is no way back, as in transformers.
        is_unique = len(set(teacher.class_names)) == len(teacher.class_names)
        free["label2id"] = {name: index for index, name in free["id2label"].items()} if is_unique else None
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
                f"{name} has shape {tuple(parameters[name].shape)}, {entry.sources} {tuple(entry.tensor.shape)}."
            )
        parameters[name].copy_(entry.tensor)
    used = {source for entry in weights.values() for source in entry.sources}
    return InheritanceReport(
        copied={name: " + ".join(entry.sources) for name, entry in weights.items()},
        new=[name for name in parameters if name not in weights],
        left_out=[name for name in teacher.parameter_names if name not in used],
        first_block=first_block,
    )


def _heads_for(width: int) -> int:
    """Heads nearest to the published width of 64 each, among the divisors of the width."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda heads: (abs(heads - width / 64), -heads))
