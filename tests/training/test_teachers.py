import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from sf_mllm import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import TeacherConfig
from sf_mllm.training.bootstrap.teachers import OpenClipTeacher, TimmTeacher, load_clip, load_teacher

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_timm(model="vit_tiny_patch16_224", **changes):
    return timm.create_model(model, **{**SIZES, "num_classes": 7, **changes}).eval()


def test_open_clip_teacher_equals_plain_open_clip(clip_directory):
    teacher = load_teacher(TeacherConfig(model=f"local-dir:{clip_directory}"))
    clip = open_clip.create_model(f"local-dir:{clip_directory}").eval()
    clip.visual.output_tokens = True
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        embedding, tokens = clip.visual(pixels)
        output = teacher(pixels)
    torch.testing.assert_close(output.embedding, embedding)
    torch.testing.assert_close(output.feature_map, tokens.transpose(1, 2).reshape(2, 32, 4, 4))


def test_preprocessing_comes_from_the_weights(clip_directory):
    preprocessing = load_teacher(TeacherConfig(model=f"local-dir:{clip_directory}")).preprocessing
    assert (preprocessing.image_size, preprocessing.mean, preprocessing.std) == (32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


@pytest.mark.parametrize(
    "changes",
    [
        {"global_pool": "token"},
        {"global_pool": "avg"},
        {"global_pool": "map"},
        {"global_pool": "token", "reg_tokens": 2},
        {"global_pool": "avg", "class_token": False},
        {"model": "eva_giant_patch14_224", "global_pool": "token", "mlp_ratio": 4},
        {"model": "eva_giant_patch14_224", "global_pool": "avg", "mlp_ratio": 4},
    ],
)
def test_timm_teacher_equals_plain_timm(changes):
    """With mean pooling timm keeps the final norm in the head; feature maps must be normalised all the same."""
    vit = tiny_timm(**changes)
    pooling = changes["global_pool"]
    norm = vit.fc_norm if pooling == "avg" else vit.norm
    torch.nn.init.normal_(norm.weight)
    pixels = torch.randn(2, 3, 32, 32)
    output = TimmTeacher(vit)(pixels)
    with torch.no_grad():
        tokens = vit.forward_features(pixels)
        if pooling == "avg":
            tokens = vit.fc_norm(tokens)
        torch.testing.assert_close(output.embedding, vit(pixels))
    patches = tokens[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(output.feature_map, patches.transpose(1, 2).reshape(2, 32, 4, 4))


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_open_clip_with_a_timm_trunk_normalises_its_feature_map(pooling):
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_proj": None, "timm_pool": pooling}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(24, vision, text).eval()
    clip.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    trunk = clip.visual.trunk
    norm = trunk.norm if pooling == "token" else trunk.fc_norm
    torch.nn.init.normal_(norm.weight)
    pixels = torch.randn(2, 3, 160, 160)
    output = OpenClipTeacher(clip)(pixels)
    with torch.no_grad():
        tokens = trunk.fc_norm(trunk.forward_features(pixels))
        torch.testing.assert_close(output.embedding, clip.encode_image(pixels))
    torch.testing.assert_close(output.feature_map, tokens[:, 1:].transpose(1, 2).reshape(2, 64, 10, 10))


def test_teachers_are_frozen_and_in_eval_mode(clip_directory):
    for teacher in (load_teacher(TeacherConfig(model=f"local-dir:{clip_directory}")), TimmTeacher(tiny_timm())):
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any(module.training for module in teacher.modules())
        output = teacher(torch.randn(1, 3, 32, 32, requires_grad=True))
        assert not output.embedding.requires_grad and not output.feature_map.requires_grad


def test_a_timm_directory_names_its_classes(tmp_path):
    vit = tiny_timm(num_classes=3)
    timm.models.save_for_hf(vit, tmp_path, {"label_names": ["cat", "dog", "bird"]}, model_args=SIZES)
    teacher = load_teacher(TeacherConfig(source="timm", model=f"local-dir:{tmp_path}"))
    assert teacher.output_kind == "logits" and teacher.preprocessing.image_size == 32
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels).embedding, vit(pixels))
    student, _ = SparseFormerModel.from_vit(teacher.vit)
    student.save_pretrained(tmp_path / "student")
    loaded = SparseFormerModel.from_pretrained(tmp_path / "student")
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    assert loaded.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert loaded(torch.randn(1, 3, 40, 40)).pooler_output.shape == (1, 3)


@pytest.mark.parametrize(
    ("architecture", "num_classes", "kind", "name"),
    [
        ("vit_tiny_patch16_224", 1000, "logits", (0, "tench, Tinca tinca")),
        ("vit_tiny_patch16_224", 21843, "logits", (21842, "knothole")),
        ("vit_tiny_patch16_224", 7, "logits", (6, "LABEL_6")),
        ("vit_tiny_patch16_224", 0, "embedding", None),
        ("vit_xsmall_patch16_clip_224", 512, "embedding", None),  # the CLIP space
        ("vit_xsmall_patch16_clip_224", 1000, "logits", (0, "tench, Tinca tinca")),  # a CLIP fine-tuned on ImageNet
        ("eva02_tiny_patch14_224", 0, "embedding", None),
    ],
)
def test_what_a_timm_teacher_says(architecture, num_classes, kind, name):
    with torch.device("meta"):
        vit = timm.create_model(architecture, num_classes=num_classes)
        teacher = TimmTeacher(vit)
        assert teacher.output_kind == kind
        if name is not None:
            labels = SparseFormerModel.from_vit(vit)[0].config.id2label
            assert len(labels) == num_classes and labels[name[0]] == name[1]


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"model": "ViT-S-32-alt"}, 32),
        ({"model": "ViT-B-16-SigLIP"}, 16),
        ({"source": "timm", "model": "vit_tiny_patch16_224"}, 16),
    ],
)
def test_a_teacher_at_another_image_size(settings, side):
    size = 2 * side
    with torch.device("meta"):
        teacher = load_teacher(TeacherConfig(**settings, allow_random=True, image_size=size))
        assert teacher.preprocessing.image_size == size
        assert teacher(torch.randn(1, 3, size, size)).feature_map.shape[-2:] == (2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B-16"}, "has no weights"),
        ({"model": "ViT-B-61", "pretrained": "openai"}, "Did you mean 'ViT-B-16'"),
        ({"model": "ViT-B-16-quickgelu", "pretrained": "openia"}, "Did you mean 'openai'"),
        ({"model": "ViT-B-16", "pretrained": "weights.pt"}, "neither a file nor a tag"),
        ({"model": "local-dir:/nowhere"}, "cannot be loaded by open_clip"),
        ({"model": "demo:clop"}, "Did you mean 'clip'"),
        ({"source": "timm", "model": "vit_base_patch61_224", "pretrained": "openai"}, "Did you mean 'vit_base_patch16"),
        ({"source": "timm", "model": "vit_base_patch16_clip_224", "pretrained": "opnai"}, "Did you mean 'openai'"),
        ({"source": "timm", "model": "resnet18", "allow_random": True}, "is a ResNet; only VisionTransformer"),
        (
            {"source": "timm", "model": "vit_base_patch16_clip_224", "pretrained": "openai"},
            r"trained with quick GELU.* set teacher\.model=vit_base_patch16_clip_quickgelu_224",
        ),
        ({"model": "ViT-B-16", "pretrained": "openai"}, r"quick GELU.* set teacher\.model=ViT-B-16-quickgelu"),
    ],
)
def test_unusable_teachers_get_one_sentence(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(TeacherConfig(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16", "laion2b_s34b_b88k"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k"),
    ],
)
def test_fitting_activations_are_not_refused(monkeypatch, model, tag):
    """The last tag says nothing of its activation, and its architecture has the right one."""
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: asked.append(args))
    load_clip(TeacherConfig(model=model, pretrained=tag))
    assert asked == [(model, tag)]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_student_computes_the_activation_of_its_teacher(activation):
    """Whatever a name promises: what counts is what the loaded blocks do."""
    torch.manual_seed(0)
    vit = tiny_timm(act_layer=activation)
    teacher = TimmTeacher(vit)
    student, report = SparseFormerModel.from_vit(teacher.vit, num_hidden_layers=1)
    assert student.config.hidden_act == activation
    tokens = 5 * torch.randn(2, 3, 32)  # large, where the two differ
    with torch.no_grad():
        torch.testing.assert_close(student.cortex[0](tokens), vit.blocks[report.first_block](tokens))


def test_a_directory_with_damaged_weights_gets_one_sentence(clip_directory, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((clip_directory / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="cannot be loaded by open_clip"):
        load_teacher(TeacherConfig(model=f"local-dir:{tmp_path}"))


def test_feature_maps_point_the_right_way(clip_directory):
    """The upper left patch of the image is the upper left cell of the map."""
    teacher = load_teacher(TeacherConfig(model=f"local-dir:{clip_directory}"))
    pixels = torch.zeros(1, 3, 32, 32)
    changed = pixels.clone()
    changed[..., :8, 24:] = 1.0  # the upper right patch
    difference = (teacher(changed).feature_map - teacher(pixels).feature_map).norm(dim=1)[0]
    assert F.one_hot(difference.argmax(), 16).reshape(4, 4)[0, 3] == 1
