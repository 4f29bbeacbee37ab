"""A SparseFormer as the image tower of an open_clip model."""

import open_clip
import pytest
import torch

from sf_mllm import SparseFormerModel, replace_visual
from sf_mllm.errors import InputError
from tests.encoder.test_from_vit import small_clip, small_timm
from tests.encoder.tiny import tiny_model


def test_encode_image_runs_the_encoder_beside_the_clips_own_text_tower() -> None:
    clip = small_clip()
    texts = torch.randint(0, 32, (3, 8))
    images = torch.randn(2, 3, 32, 32)
    encoder, _ = SparseFormerModel.from_vit(clip)
    encoder.eval()
    with torch.no_grad():
        text_before = clip.encode_text(texts)
        assert replace_visual(clip, encoder) is clip
        torch.testing.assert_close(clip.encode_image(images), encoder(images).pooler_output)
        torch.testing.assert_close(clip.encode_text(texts), text_before)
        image_embedding, text_embedding, scale = clip(images, texts)
        assert torch.allclose(image_embedding.norm(dim=-1), torch.ones(2))
        assert (scale * image_embedding @ text_embedding.T).shape == (2, 3)
    assert clip.visual.image_size == (32, 32)
    clip.lock_image_tower()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    clip.set_grad_checkpointing()
    assert encoder.is_gradient_checkpointing


def test_a_second_replacement_and_a_misfit() -> None:
    clip = small_clip()
    encoder, _ = SparseFormerModel.from_vit(clip)
    replace_visual(replace_visual(clip, encoder), encoder)
    other, _ = SparseFormerModel.from_vit(small_timm())
    with pytest.raises(InputError, match="10 dimensions, this CLIP model into 24"):
        replace_visual(clip, other)
    with pytest.raises(InputError, match="no image tower"):
        replace_visual(torch.nn.Linear(2, 2), encoder)


def test_an_encoder_without_projection_embeds_in_its_own_width() -> None:
    clip = small_clip()
    wide, _ = SparseFormerModel.from_vit(small_timm(num_classes=0))
    with pytest.raises(InputError, match="64 dimensions, this CLIP model into 24"):
        replace_visual(clip, wide)
    narrow, _ = SparseFormerModel.from_vit(small_timm(num_classes=0, embed_dim=24, num_heads=2))
    with torch.no_grad():
        assert replace_visual(clip, narrow).encode_image(torch.randn(1, 3, 32, 32)).shape == (1, 24)
    replace_visual(clip, narrow)  # a second time: the width is read from the encoder that stands there


@pytest.mark.parametrize(
    "head",
    [
        {"timm_proj": "linear", "timm_pool": "token"},
        {"timm_proj": "mlp", "timm_pool": "avg"},
        {"timm_proj": None, "timm_pool": "token"},  # the trunk's classifier projects
        {"timm_proj": "none", "timm_pool": "avg", "embed_dim": 64},
        {"timm_model_name": "resnet10t", "timm_pool": "rot_attn", "timm_proj": None, "image_size": 64},
        {"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": None, "image_size": 176},
        {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "none", "image_size": 64, "embed_dim": 512},
    ],
)
def test_the_width_of_towers_from_timm_is_known(head: dict) -> None:
    """An encoder of another width is refused, one of the same is taken; the tower itself says which that is."""
    head = dict(head)
    width = head.pop("embed_dim", 24)
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(width, {"timm_model_name": "test_vit", "image_size": 160, **head}, text).eval()
    with torch.no_grad():
        assert clip.encode_image(torch.randn(1, 3, *clip.visual.image_size)).shape == (1, width)
    with pytest.raises(InputError, match=f"6 dimensions, this CLIP model into {width}"):
        replace_visual(clip, tiny_model())
    replace_visual(clip, tiny_model(projection_size=width))
