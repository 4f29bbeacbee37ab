"""The encoder comes back out of a multimodal directory, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sf_mllm import SparseFormerConfig, SparseFormerImageProcessor, SparseFormerModel
from sf_mllm.errors import InputError
from tests.tiny_vlm import make_encoder, make_sf_llava


def test_tower_of_a_multimodal_directory(tmp_path: Path) -> None:
    model, processor = make_sf_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = SparseFormerModel.from_pretrained(tmp_path)
    expected = model.model.vision_tower.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert SparseFormerConfig.from_pretrained(tmp_path).num_latents == encoder.config.num_latents
    encoder.save_pretrained(tmp_path / "alone")
    again = SparseFormerModel.from_pretrained(tmp_path / "alone")
    assert load_file(tmp_path / "alone" / "model.safetensors").keys() == encoder.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    saved = SparseFormerImageProcessor.from_pretrained(tmp_path)
    assert saved.to_dict() == processor.image_processor.to_dict()


def test_a_tower_saved_alone_is_an_encoder_directory(tmp_path: Path) -> None:
    model, _ = make_sf_llava()
    model.save_pretrained(tmp_path / "both")
    SparseFormerModel.from_pretrained(tmp_path / "both").save_pretrained(tmp_path / "alone")
    encoder = SparseFormerModel.from_pretrained(tmp_path / "alone")
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name


def test_a_multimodal_directory_inside_another(tmp_path: Path) -> None:
    """As hub repositories keep them: `subfolder` is for the configuration as well as for the weights."""
    model, _ = make_sf_llava()
    model.save_pretrained(tmp_path / "chat")
    encoder = SparseFormerModel.from_pretrained(tmp_path, subfolder="chat")
    assert torch.equal(encoder.cls_token, model.model.vision_tower.cls_token)


def test_a_missing_tower_weight_is_still_noticed(tmp_path: Path) -> None:
    model, _ = make_sf_llava()
    weights = model.state_dict()
    del weights["model.vision_tower.norm.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"norm\.weight"):
        SparseFormerModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 keys of another shape \(norm\.weight is \[3\] instead of \["):
        SparseFormerModel.from_pretrained(tmp_path)
