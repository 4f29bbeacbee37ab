"""Inheriting from open_clip and timm teachers."""

import open_clip
import pytest
import timm
import torch
from timm.layers import DiffAttention, GluMlp, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva

from sf_mllm import SparseFormerModel
from sf_mllm.encoder.weights_vit import InheritanceReport, config_for_vit, describe_vit, inherit_weights
from sf_mllm.errors import InputError

# Built on the meta device where only sizes matter; full-size weights are drawn for one block at a time.


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights, biases and norms included, so that a wrong copy cannot hide behind zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return module.eval()


def small_clip(**vision: object) -> torch.nn.Module:
    quick_gelu = bool(vision.pop("quick_gelu", False))
    vision_cfg = {"image_size": 32, "layers": 6, "width": 64, "head_width": 16, "patch_size": 8, **vision}
    text_cfg = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    return fill(open_clip.CLIP(24, vision_cfg, text_cfg, quick_gelu=quick_gelu))


def small_timm(**changes: object) -> torch.nn.Module:
    make = changes.pop("cls", timm.models.vision_transformer.VisionTransformer)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
    return fill(make(**{**sizes, **changes}))


def blocks_of(teacher: torch.nn.Module) -> torch.nn.ModuleList:
    visual = getattr(teacher, "visual", teacher)
    return visual.transformer.resblocks if hasattr(visual, "transformer") else getattr(visual, "trunk", visual).blocks


def assert_blocks_agree(student: SparseFormerModel, teacher: torch.nn.Module, first: int) -> None:
    width = student.config.hidden_size
    tokens = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for ours, theirs in zip(student.cortex, list(blocks_of(teacher))[first:], strict=True):
            torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


def assert_everything_above_agrees(student: SparseFormerModel, teacher: torch.nn.Module, first: int) -> None:
    """Fed with the teacher's own tokens, what was inherited must give what the teacher gives."""
    entering = []
    visual = getattr(teacher, "visual", teacher)
    hook = blocks_of(teacher)[first].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    size = visual.image_size if hasattr(visual, "image_size") else visual.patch_embed.img_size
    with torch.no_grad():
        expected = visual(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)))
        hook.remove()
        tokens = entering[0]
        for block in student.cortex:
            tokens = block(tokens)
        if (
            not student.config.use_cls_token
        ):  # the teacher's blocks have its class and register tokens, its pool has not
            tokens = tokens[:, getattr(getattr(visual, "trunk", visual), "num_prefix_tokens", 1) :]
        pooled = student.pool(tokens, student.norm(tokens))
        torch.testing.assert_close(student.projection(pooled), expected, rtol=1e-5, atol=1e-5)


def sources(report: InheritanceReport) -> set[str]:
    """Parameters of the teacher that the report names as copied."""
    return {name for names in report.copied.values() for name in names.split(" + ")} - {"zeros"}


CLIP_VARIANTS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "no_pre_norm": {"no_ln_pre": True},
    "layer_scale": {"ls_init_value": 0.5},
    "mean_pooling": {"pool_type": "avg"},
    "mean_pooling_then_norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "wide_mlp": {"mlp_ratio": 3.0},
}


@pytest.mark.parametrize("variant", CLIP_VARIANTS)
def test_open_clip_blocks_norm_and_projection(variant: str) -> None:
    teacher = small_clip(**CLIP_VARIANTS[variant])
    student, report = SparseFormerModel.from_vit(teacher)
    student.eval()
    assert len(student.cortex) == 4 and report.first_block == 2
    assert student.config.hidden_act == ("quick_gelu" if variant == "quick_gelu" else "gelu")
    assert student.config.use_cls_token == (student.config.pooling == "cls")
    assert student.config.num_tokens == 49
    assert_blocks_agree(student, teacher, first=2)
    assert_everything_above_agrees(student, teacher, first=2)


TIMM_VARIANTS = {
    "classifier": {},
    "no_head": {"num_classes": 0},
    "mean_pooling": {"global_pool": "avg"},
    "mean_pooling_norm_first": {"global_pool": "avg", "fc_norm": False},
    "class_token_then_norm": {"fc_norm": True},
    "no_final_norm": {"final_norm": False},
    "attention_pooling": {"global_pool": "map", "class_token": False},
    "attention_pooling_without_head": {"global_pool": "map", "class_token": False, "num_classes": 0},
    "attention_pooling_beside_registers": {"global_pool": "map", "reg_tokens": 2, "act_layer": "gelu_tanh"},
    "pre_norm": {"pre_norm": True},
    "layer_scale": {"init_values": 0.5},
    "no_qkv_bias": {"qkv_bias": False},
    "no_position_for_the_class_token": {"no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "other_activation": {"act_layer": "quick_gelu"},
    "eva": {"cls": Eva, "global_pool": "token"},
    "eva_layer_scale": {"cls": Eva, "init_values": 0.5},
    "eva_no_qkv_bias": {"cls": Eva, "qkv_bias": False},
}


@pytest.mark.parametrize("variant", TIMM_VARIANTS)
def test_timm_blocks_norm_and_head(variant: str) -> None:
    settings = TIMM_VARIANTS[variant]
    teacher = small_timm(**settings)
    student, report = SparseFormerModel.from_vit(teacher, num_hidden_layers=5)
    student.eval()
    assert report.first_block == 1 and student.config.layer_norm_eps == 1e-6
    assert student.config.num_tokens == 49
    assert (student.config.pooling == "attention") == (settings.get("global_pool") == "map")
    assert student.config.use_cls_token == (student.config.pooling == "cls")
    assert student.config.final_norm == (variant != "no_final_norm")
    assert sources(report) | set(report.left_out) == set(dict(teacher.named_parameters()))
    assert not sources(report) & set(report.left_out)
    assert ("zeros" in report.copied.values()) == ("no_qkv_bias" in variant)
    assert_blocks_agree(student, teacher, first=1)
    assert_everything_above_agrees(student, teacher, first=1)


TRUNK_VARIANTS = {  # open_clip's settings of a timm image tower
    "projection behind the trunk": {"timm_proj": "linear", "timm_pool": "token"},
    "the trunk's own head projects": {"timm_proj": None, "timm_pool": "token"},
    "mean pooling": {"timm_proj": "linear", "timm_proj_bias": True, "timm_pool": "avg"},
    "no projection": {"timm_proj": "none", "timm_pool": "avg"},
    "attention pooling": {"timm_proj": "none", "timm_pool": "map", "timm_model_name": "vit_base_patch16_siglip_224"},
}


@pytest.mark.parametrize("variant", TRUNK_VARIANTS)
def test_open_clip_with_a_timm_trunk(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind the blocks must give the teacher's embedding, wherever open_clip keeps it."""
    settings = TRUNK_VARIANTS[variant]
    width = 64 if settings["timm_proj"] == "none" else 24
    vision = {"timm_model_name": "test_vit", "image_size": 160, **settings}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    create = timm.create_model
    if "siglip" in vision["timm_model_name"]:  # the published one in small: open_clip passes no sizes to timm
        vision["image_size"] = 32
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}
        monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, **sizes}))
    teacher = fill(open_clip.CLIP(width, vision, text))
    student, report = SparseFormerModel.from_vit(teacher)
    student.eval()
    assert sources(report) | set(report.left_out) == set(dict(teacher.visual.named_parameters()))
    assert_everything_above_agrees(student, teacher, first=report.first_block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_gives_a_student_in_fp32(dtype: torch.dtype) -> None:
    teacher = small_clip().requires_grad_(False).to(dtype)
    student, _ = SparseFormerModel.from_vit(teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(student.cortex[0].mlp.fc1.weight, blocks_of(teacher)[2].mlp.c_fc.weight.float())


def test_class_token_starts_as_it_enters_the_teachers_first_block() -> None:
    teacher = small_clip()
    entering = []
    teacher.visual.transformer.resblocks[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        teacher.encode_image(torch.randn(1, 3, 32, 32))
    student, _ = SparseFormerModel.from_vit(teacher)
    torch.testing.assert_close(student.cls_token[0], entering[0][0, 0])

    noise, report = SparseFormerModel.from_vit(teacher, start_from_class_token=False)
    assert "cls_token" in report.new
    assert not torch.allclose(noise.cls_token[0], entering[0][0, 0])

    vit = small_timm()
    entering.clear()
    vit.blocks[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        vit(torch.randn(1, 3, 32, 32))
    student, _ = SparseFormerModel.from_vit(vit)
    torch.testing.assert_close(student.cls_token[0], entering[0][0, 0])


def test_report_accounts_for_every_tensor() -> None:
    teacher = small_clip()
    student, report = SparseFormerModel.from_vit(teacher)
    assert set(report.copied) | set(report.new) == set(dict(student.named_parameters()))
    assert not set(report.copied) & set(report.new)
    assert sources(report) | set(report.left_out) == set(dict(teacher.visual.named_parameters()))
    assert "transformer.resblocks.1.ln_1.weight" in report.left_out
    assert report.copied["cortex.0.norm1.weight"] == "transformer.resblocks.2.ln_1.weight"
    assert "teacher blocks from 2" in str(report)


FULL_SIZE = {
    "open_clip ViT-B-16": (
        lambda: open_clip.create_model("ViT-B-16-quickgelu", device="meta"),
        4,
        8,
        48,
        "quick_gelu",
        1e-5,
    ),
    "open_clip ViT-L-14": (lambda: open_clip.create_model("ViT-L-14", device="meta"), 8, 16, 63, "gelu", 1e-5),
    "timm ViT-B-16": (lambda: timm.create_model("vit_base_patch16_224"), 4, 8, 48, "gelu", 1e-6),
    "timm ViT-L-16-384": (lambda: timm.create_model("vit_large_patch16_384"), 8, 16, 63, "gelu", 1e-6),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_teachers(name: str) -> None:
    """Sizes follow the published students; first and last inherited block are compared with drawn weights."""
    make, first, depth, latents, activation, eps = FULL_SIZE[name]
    with torch.device("meta"):
        teacher = make().eval()
        description = describe_vit(teacher)
        student = SparseFormerModel(config_for_vit(description, {})).eval()
        report = inherit_weights(student, description, start_from_class_token=True)
    assert (len(student.cortex), student.config.num_latents) == (depth, latents)
    assert (student.config.hidden_act, student.config.layer_norm_eps) == (activation, eps)
    assert report.first_block == first
    for ours_index, theirs_index in ((0, first), (depth - 1, first + depth - 1)):
        theirs = fill(blocks_of(teacher)[theirs_index].to_empty(device="cpu"))
        ours = student.cortex[ours_index].to_empty(device="cpu")
        # Fill our block through the names the report gives, so that the report itself is what is tested.
        with torch.no_grad():
            for parameter_name, parameter in ours.named_parameters():
                source = report.copied[f"cortex.{ours_index}.{parameter_name}"].split(f".{theirs_index}.", 1)[1]
                parameter.copy_(dict(theirs.named_parameters())[source])
            tokens = torch.randn(1, 5, student.config.hidden_size, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: small_clip(attentional_pool=True), "CoCa's AttentionalPooler"),
        (lambda: small_clip(pool_type="none"), "pooling 'none'"),
        (lambda: small_clip(qk_norm=True), "attention"),
        (lambda: small_timm(global_pool="avgmax"), "pooling 'avgmax'"),
        (lambda: small_timm(global_pool="prr"), "pooling 'prr'"),
        (lambda: small_timm(global_pool="avg", pool_include_prefix=True), "class or register tokens"),
        (lambda: small_timm(global_pool="map", pool_include_prefix=True), "class or register tokens"),
        (lambda: small_timm(cls=Eva, global_pool="map"), "class or register tokens"),
        (
            lambda: small_timm(cls=Eva, class_token=False, global_pool="map", attn_pool_num_heads=8),
            "attention pool has 8 heads, its blocks 4",
        ),
        (
            lambda: small_timm(cls=Eva, class_token=False, global_pool="map", attn_pool_mlp_ratio=2),
            "attention pool has 128 hidden units, its blocks 256",
        ),
        (lambda: small_timm(cls=Eva, use_rot_pos_emb=True), "rotates"),
        (lambda: small_timm(cls=Eva, use_post_norm=True), "EvaBlockPostNorm"),
        (lambda: small_timm(cls=Eva, swiglu_mlp=True), "gated MLP"),
        (lambda: small_timm(qk_norm=True), "extra norms"),
        (lambda: small_timm(block_fn=timm.models.vision_transformer.ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: small_timm(mlp_layer=GluMlp), "gated MLP"),
        (lambda: small_timm(mlp_layer=SwiGLU, embed_dim=64), r"gated MLP \(SwiGLU\)"),
        (lambda: small_timm(attn_layer=DiffAttention), "lambda_q1"),
        (lambda: small_timm(norm_layer=RmsNorm), "RmsNorm"),
        (lambda: small_timm(cls=VisionTransformerDistilled), "distillation"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), "Beit"),
        (lambda: timm.create_model("samvit_base_patch16", depth=1, global_attn_indexes=()), "VisionTransformerSAM"),
        (lambda: timm.create_model("resnet18"), "ResNet"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_what_cannot_be_inherited_is_refused_with_a_reason(teacher, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseFormerModel.from_vit(teacher())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_latent": 9}, "Did you mean 'num_latents'"),
        ({"hidden_size": 128}, "follows the teacher"),
        ({"num_hidden_layers": 7}, "more than the teacher's 6 blocks"),
        ({"padding_mode": "bordr"}, "'border', 'zeros'"),
        ({"num_latents": "many"}, "num_latents"),
    ],
)
def test_contradicting_overrides(overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseFormerModel.from_vit(small_clip(), **overrides)


def test_overrides_shape_the_student() -> None:
    student, _ = SparseFormerModel.from_vit(small_clip(), num_latents=7, focusing_size=24, num_hidden_layers=3)
    assert student(torch.randn(1, 3, 30, 50)).last_hidden_state.shape == (1, 8, 64)
