import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap_config import TeacherConfig
from sf_mllm.training.teachers import OpenClipTeacher, TimmTeacher, load_teacher


def tiny_timm(**changes):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes}).eval()


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


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_timm_teacher_equals_plain_timm(pooling):
    """With mean pooling timm keeps the final norm in the head; feature maps must be normalised all the same."""
    vit = tiny_timm(global_pool=pooling)
    norm = vit.norm if pooling == "token" else vit.fc_norm
    torch.nn.init.normal_(norm.weight)
    pixels = torch.randn(2, 3, 32, 32)
    output = TimmTeacher(vit)(pixels)
    with torch.no_grad():
        tokens = vit.forward_features(pixels)
        if pooling == "avg":
            tokens = vit.fc_norm(tokens)
        torch.testing.assert_close(output.embedding, vit(pixels))
    torch.testing.assert_close(output.feature_map, tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4))


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


def test_weights_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-S-32-alt")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    torch.manual_seed(1)
    teacher = load_teacher(TeacherConfig(model="ViT-S-32-alt", pretrained=str(tmp_path / "clip.pt")))
    assert isinstance(teacher, OpenClipTeacher)
    torch.testing.assert_close(teacher.visual.state_dict(), clip.visual.state_dict(), rtol=0, atol=0)


def test_timm_weights_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    settings = TeacherConfig(source="timm", model="vit_tiny_patch16_224", pretrained=str(tmp_path / "vit.pth"))
    torch.testing.assert_close(load_teacher(settings).vit.state_dict(), vit.state_dict(), rtol=0, atol=0)


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
    ],
)
def test_unusable_teachers_get_one_sentence(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(TeacherConfig(**settings))
    assert "\n" not in str(caught.value)


def test_weights_with_another_activation_are_refused(monkeypatch):
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"quick_gelu": True})
    with pytest.raises(InputError, match=r"set teacher\.model=ViT-B-16-quickgelu"):
        load_teacher(TeacherConfig(model="ViT-B-16", pretrained="openai"))


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
