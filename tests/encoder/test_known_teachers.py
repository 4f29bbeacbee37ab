"""Which published ViTs a student can inherit from, and why not from the others; on the meta device, without weights."""

import copy
import re
from collections import Counter

import open_clip
import pytest
import timm
import torch

from sf_mllm import SparseFormerModel
from sf_mllm.encoder.weights_vit import config_for_vit, describe_vit, inherit_weights
from sf_mllm.errors import InputError

NO_VIT = "no ViT"
POSITIONS = "rotates"
RELATIVE = "relative positions"
GATED = "gated MLP"
ORDER = "other order in a block"
NORMS = "extra norms"
COCA = "CoCa's pool"
TWO_TOKENS = "two class tokens"
PREFIX = "pools its registers"
# What the reason of a refusal must hold, in the order in which they are tried.
REASONS = {
    NO_VIT: r"is a (ConvNeXt|FastVit|SwinTransformer|NaFlexVit|VisionTransformerSAM)|of type \w*ResNet",
    RELATIVE: r"is a (Beit|VisionTransformerRelPos)",
    POSITIONS: r"rotates queries and keys",
    GATED: r"a gated MLP \((SwiGLU|GluMlp)\)",
    ORDER: r"is a (\w*Parallel\w*|ResPost|EvaBlockPostNorm)\w*; only",
    NORMS: r"has extra norms|is a RmsNorm|lambda_q1",
    COCA: r"CoCa's AttentionalPooler",
    TWO_TOKENS: r"second class token",
    PREFIX: r"class or register tokens with the others",
}
# (pooling, activation, inherited blocks, tokens) of a student, or why there is none.
OPEN_CLIP = {
    "ViT-B-32": ("cls", "gelu", 8, 49),
    "ViT-B-16": ("cls", "gelu", 8, 49),
    "ViT-B-16-quickgelu": ("cls", "quick_gelu", 8, 49),
    "ViT-L-14": ("cls", "gelu", 16, 64),
    "ViT-L-14-336-quickgelu": ("cls", "quick_gelu", 16, 64),
    "ViT-H-14": ("cls", "gelu", 21, 64),
    "ViT-H-14-378-quickgelu": ("cls", "quick_gelu", 21, 64),
    "ViT-g-14": ("cls", "gelu", 27, 64),
    "ViT-bigG-14": ("cls", "gelu", 32, 64),
    "ViT-L-14-CLIPA": ("mean_then_norm", "gelu", 16, 64),
    "MobileCLIP2-B": ("cls", "gelu", 8, 49),
    "ViT-B-16-SigLIP": ("attention", "gelu", 8, 49),
    "ViT-B-16-SigLIP2-512": ("attention", "gelu", 8, 49),
    "ViT-L-16-SigLIP2-384": ("attention", "gelu", 16, 64),
    "ViT-SO400M-14-SigLIP-384": ("attention", "gelu", 18, 64),
    "ViT-SO400M-16-SigLIP2-512": ("attention", "gelu_pytorch_tanh", 18, 64),
    "EVA01-g-14": ("cls", "gelu", 27, 64),
    "EVA02-L-14": POSITIONS,
    "EVA02-E-14": ORDER,
    "PE-Core-L-14-336": POSITIONS,
    "coca_ViT-L-14": COCA,
    "ViTamin-L": NORMS,
    "convnext_base_w": NO_VIT,
    "RN50": NO_VIT,
}
TIMM = {
    "vit_tiny_patch16_224": ("cls", "gelu", 8, 49),
    "vit_small_patch16_384": ("cls", "gelu", 8, 49),
    "vit_base_patch16_224": ("cls", "gelu", 8, 49),
    "vit_large_patch16_384": ("cls", "gelu", 16, 64),
    "vit_base_r50_s16_384": ("cls", "gelu", 8, 49),
    "vit_base_patch16_clip_quickgelu_224": ("cls", "quick_gelu", 8, 49),
    "vit_base_patch16_siglip_224": ("attention", "gelu", 8, 49),
    "vit_so400m_patch14_siglip_gap_384": ("norm_then_mean", "gelu", 18, 64),
    "vit_base_patch14_reg4_dinov2": ("cls", "gelu", 8, 49),
    "vit_large_patch14_dinov2": ("cls", "gelu", 16, 64),
    "deit_base_patch16_224": ("cls", "gelu", 8, 49),
    "deit3_huge_patch14_224": ("cls", "gelu", 21, 64),
    "vit_so150m2_patch16_reg1_gap_256": ("mean_then_norm", "gelu", 14, 49),
    "eva_large_patch14_196": ("mean_then_norm", "gelu", 16, 64),
    "vit_intern300m_patch14_448": ("cls", "gelu", 16, 64),
    "vit_giant_patch14_dinov2": GATED,
    "vit_large_patch16_dinov3": POSITIONS,
    "eva02_large_patch14_448": POSITIONS,
    "aimv2_large_patch14_224": GATED,
    "beit_base_patch16_224": RELATIVE,
    "deit_base_distilled_patch16_224": TWO_TOKENS,
    "samvit_base_patch16": NO_VIT,
    "resnet50": NO_VIT,
}


def build(library: str, name: str) -> torch.nn.Module:
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        config = copy.deepcopy(open_clip.get_model_config(name))
        return open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )


def outcome(library: str, name: str) -> tuple[str, str, int, int] | str:
    """What a student of this teacher is like, or the reason for which there is none."""
    teacher = build(library, name)
    try:
        with torch.device("meta"):
            description = describe_vit(teacher)
            student = SparseFormerModel(config_for_vit(description, {}))
            inherit_weights(student, description, start_from_class_token=True)  # compares all shapes
    except InputError as error:
        reasons = [reason for reason, pattern in REASONS.items() if re.search(pattern, str(error))]
        assert reasons, f"{name}: no known reason: {error}"
        return reasons[0]
    config = student.config
    return config.pooling, config.hidden_act, config.num_hidden_layers, config.num_tokens


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_models(name: str) -> None:
    assert outcome("open_clip", name) == OPEN_CLIP[name]


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name: str) -> None:
    assert outcome("timm", name) == TIMM[name]


@pytest.mark.slow
def test_every_open_clip_model_is_inherited_or_refused_for_a_known_reason() -> None:
    """At least as many as in open_clip 3.3; later versions may add some."""
    outcomes = Counter(kind(outcome("open_clip", name)) for name in open_clip.list_models())
    at_least = {"cls": 53, "attention": 28, "mean_then_norm": 6, "norm_then_mean": 1, NO_VIT: 28, NORMS: 15,
                POSITIONS: 8, COCA: 2, ORDER: 2, RELATIVE: 1}  # fmt: skip
    assert outcomes >= Counter(at_least) and outcomes.keys() == at_least.keys()


@pytest.mark.slow
def test_every_timm_vit_is_inherited_or_refused_for_a_known_reason() -> None:
    """At least as many as in timm 1.0.31; later versions may add some."""
    modules = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos",
               "vision_transformer_sam", "deit", "eva", "beit", "naflexvit")  # fmt: skip
    names = [name for module in modules for name in timm.list_models(module=module)]
    outcomes = Counter(kind(outcome("timm", name)) for name in names)
    at_least = {"cls": 97, "norm_then_mean": 28, "mean_then_norm": 20, "attention": 17, POSITIONS: 60, RELATIVE: 21,
                NO_VIT: 18, GATED: 15, ORDER: 9, NORMS: 7, TWO_TOKENS: 4, PREFIX: 1}  # fmt: skip
    assert outcomes >= Counter(at_least) and outcomes.keys() == at_least.keys()


def kind(result: tuple[str, str, int, int] | str) -> str:
    return result if isinstance(result, str) else result[0]
