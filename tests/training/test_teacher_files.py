"""Weights of teachers from local files: every format that is published, and what is refused."""

import os

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sf_mllm import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import TeacherConfig
from sf_mllm.training.bootstrap.teachers import OpenClipTeacher, load_teacher

SMALL_CLIP = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def clip_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return open_clip.create_model(SMALL_CLIP).state_dict()


@pytest.fixture(scope="module")
def vit_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict()


def save(state: dict[str, Tensor], path) -> str:
    """Write a state dict in the format that the file's name asks for."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.name == "epoch_3.pt":  # as open_clip's training writes it under DDP
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", ["clip.pt", "open_clip_model.safetensors", "epoch_3.pt"])
def test_open_clip_weights_from_a_local_file(tmp_path, clip_state, name):
    teacher = load_teacher(TeacherConfig(model=SMALL_CLIP, pretrained=save(clip_state, tmp_path / name)))
    assert isinstance(teacher, OpenClipTeacher) and teacher.output_kind == "embedding"
    expected = {key.removeprefix("visual."): t for key, t in clip_state.items() if key.startswith("visual.")}
    torch.testing.assert_close(dict(teacher.visual.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit.pth", "pytorch_model.bin", "model.safetensors"])
def test_timm_weights_from_a_local_file(tmp_path, vit_state, name):
    """The file says how many classes there are; the model's name would say 1000."""
    settings = TeacherConfig(source="timm", model="vit_tiny_patch16_224", pretrained=save(vit_state, tmp_path / name))
    teacher = load_teacher(settings)
    torch.testing.assert_close(dict(teacher.vit.state_dict()), dict(vit_state), rtol=0, atol=0)
    assert teacher.output_kind == "logits"
    assert SparseFormerModel.from_vit(teacher.vit)[0].config.id2label[9] == "LABEL_9"


def test_timm_weights_without_a_head_give_an_embedding(tmp_path, vit_state):
    headless = {name: tensor for name, tensor in vit_state.items() if not name.startswith("head.")}
    settings = TeacherConfig(
        source="timm", model="vit_tiny_patch16_224", pretrained=save(headless, tmp_path / "vit.pth")
    )
    teacher = load_teacher(settings)
    assert teacher.output_kind == "embedding"
    assert teacher(torch.randn(1, 3, 224, 224)).embedding.shape == (1, 192)


def test_timm_weights_as_google_published_them(tmp_path, vit_state):
    """AugReg in the layout of its .npz files: transposed, heads apart, query, key and value apart."""
    arrays = {
        "cls": vit_state["cls_token"],
        "embedding/kernel": vit_state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": vit_state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": vit_state["pos_embed"],
        "Transformer/encoder_norm/scale": vit_state["norm.weight"],
        "Transformer/encoder_norm/bias": vit_state["norm.bias"],
        "head/kernel": vit_state["head.weight"].T,
        "head/bias": vit_state["head.bias"],
    }
    for index in range(12):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        for our_norm, their_norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{their_norm}/scale"] = vit_state[f"{ours}{our_norm}.weight"]
            arrays[f"{theirs}{their_norm}/bias"] = vit_state[f"{ours}{our_norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights, biases = (vit_state[f"{ours}attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(192, 3, 64)
            arrays[f"{attention}{part}/bias"] = bias.reshape(3, 64)
        arrays[f"{attention}out/kernel"] = vit_state[f"{ours}attn.proj.weight"].T.reshape(3, 64, 192)
        arrays[f"{attention}out/bias"] = vit_state[f"{ours}attn.proj.bias"]
        for number in (0, 1):
            layer = f"{ours}mlp.fc{number + 1}."
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = vit_state[f"{layer}weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = vit_state[f"{layer}bias"]
    np.savez(tmp_path / "vit.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    settings = TeacherConfig(source="timm", model="vit_tiny_patch16_224", pretrained=str(tmp_path / "vit.npz"))
    torch.testing.assert_close(dict(load_teacher(settings).vit.state_dict()), dict(vit_state), rtol=0, atol=0)


class Code:
    """What a malicious pickle holds."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def write_unusable(kind: str, state: dict[str, Tensor], path) -> None:
    if kind == "code beside the weights":
        torch.save({"state_dict": state, "extra": Code()}, path)
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    elif kind == "cut off":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "nothing":
        torch.save({}, path)
    else:
        torch.save([1, 2], path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'torch.load' received a zip file")
@pytest.mark.parametrize("source", ["open_clip", "timm"])
@pytest.mark.parametrize("kind", ["code beside the weights", "TorchScript", "cut off", "text", "nothing", "no dict"])
def test_files_that_hold_no_weights_get_one_sentence(tmp_path, monkeypatch, vit_state, source, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    write_unusable(kind, vit_state, path)
    model = SMALL_CLIP if source == "open_clip" else "vit_tiny_patch16_224"
    with pytest.raises(InputError, match="is damaged or no file of weights; give a state dict") as caught:
        load_teacher(TeacherConfig(source=source, model=model, pretrained=str(path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("timm", "vit_small_patch16_224", r"size mismatch for cls_token: .*192\]\) .*384\]\)\."),
        ("timm", "vit_tiny_patch16_384", "size mismatch for pos_embed"),
        ("timm", "deit3_small_patch16_224", "Missing key"),
        ("open_clip", SMALL_CLIP, "Missing key"),
    ],
)
def test_weights_of_another_model_get_one_short_sentence(tmp_path, vit_state, source, model, message):
    path = save(vit_state, tmp_path / "vit.pth")
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(TeacherConfig(source=source, model=model, pretrained=path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_code_in_a_directory_is_not_run_and_not_advised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        tmp_path / "vit",
        safe_serialization=False,
    )
    torch.save({"state_dict": Code()}, tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds code, which is not run"):
        load_teacher(TeacherConfig(source="timm", model=f"local-dir:{tmp_path / 'vit'}"))
    assert not (tmp_path / "harmed").exists()
