import open_clip
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from sf_mllm.bench import library_towers
from sf_mllm.bench.precision import prepare_variant
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.towers import find_tower
from sf_mllm.constants import CLIP_MEAN
from sf_mllm.errors import InputError
from tests.tiny_vlm import make_encoder, make_image_processor

TINY_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


@pytest.fixture
def encoder_directory(tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_image_processor().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def tiny_open_clip(monkeypatch):
    """Stands for every model of open_clip."""
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 4, "vocab_size": 4, "width": 16, "heads": 1, "layers": 1}
    asked = []

    def load_clip(config):
        asked.append(config)
        if config.pretrained is not None:
            raise OSError("The hub cannot be reached.")
        clip = open_clip.CLIP(8, vision, text)
        clip.visual.preprocess_cfg = {"size": 64, "mean": CLIP_MEAN, "std": CLIP_MEAN}
        return clip

    monkeypatch.setattr(library_towers, "load_clip", load_clip)
    return asked


def tokens(tower, size=None):
    pixels = torch.randn(2, 3, *reversed(size or tower.size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return tower.module(pixels)


def test_an_encoder_of_ours_has_the_same_tokens_at_any_size(encoder_directory):
    loader = find_tower(str(encoder_directory))
    own, wide = loader(None), loader(ImageSize(192, 40))
    assert own.size == (32, 32) and wide.size == (192, 40)
    assert own.weights == str(encoder_directory)
    assert tokens(own).shape == tokens(wide).shape == (2, 6, 32)
    assert own.preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 40)


def test_the_shipped_encoder_and_its_teacher():
    ours, teacher = find_tower("demo")(None), find_tower("demo:clip")(ImageSize(96, 64))
    assert (ours.weights, teacher.weights) == ("demo:sf_llava", "demo:clip")
    assert ours.size == (224, 224) and tokens(ours).shape == (2, 49, 256)
    assert tokens(teacher).shape == (2, 6 * 4, 256)
    assert ours.mean == teacher.mean == CLIP_MEAN


def test_kernels_of_an_encoder_of_ours_are_set_for_what_is_timed_only():
    tower = find_tower("demo@triton")(None)
    assert tower.kernels == "triton" and tower.weights == "demo:sf_llava"
    assert tokens(tower).shape == (2, 49, 256)  # on a CPU, which the kernel would refuse
    variant = prepare_variant(tower.module, "float32", "eager", torch.device("cpu"), tower.kernels)
    with pytest.raises(InputError, match="'triton' need a CUDA device"), torch.inference_mode():
        variant(torch.randn(1, 3, 64, 64))
    with pytest.raises(InputError, match="no encoder of ours"):
        find_tower("open_clip:ViT-B-16@triton")
    with pytest.raises(InputError, match=r"'tritn' are unknown\. Did you mean 'triton'"):
        find_tower("demo@tritn")


def test_published_sizes_are_random_with_regions_that_move():
    tower = find_tower("sparseformer:sparseformer_v1_tiny")(ImageSize(64, 64))
    assert tower.weights == "random" and tokens(tower).shape == (2, 49, 512)
    with torch.inference_mode():
        rois = tower.module.encoder(torch.randn(1, 3, 64, 64)).rois
    assert (rois[:, -1] - rois[:, 0]).abs().max() > 0.01
    again = find_tower("sparseformer:sparseformer_v1_tiny")(None)
    torch.testing.assert_close(next(tower.module.parameters()), next(again.module.parameters()))


@pytest.mark.parametrize(("size", "patches"), [(None, 16), (ImageSize(96, 64), 24), (ImageSize(32, 128), 16)])
def test_patches_of_open_clip_without_class_token(tiny_open_clip, size, patches):
    tower = find_tower("open_clip:ViT-B-16")(size)
    assert tower.weights == "random" and tower.size == (size or (64, 64))
    assert tokens(tower).shape == (2, patches, 32)


def test_position_embedding_of_open_clip_is_resized_and_not_drawn_anew(tiny_open_clip):
    own, wide = (find_tower("open_clip:ViT-B-16")(size).module.visual for size in (None, ImageSize(128, 64)))
    assert wide.positional_embedding.shape == (1 + 32, 32)
    grid, finer = (visual.positional_embedding[1:].unflatten(0, (4, -1)) for visual in (own, wide))
    # Bicubic weights of a place sum to one, so that the mean over a row stays.
    torch.testing.assert_close(finer.mean(dim=1), grid.mean(dim=1), atol=2e-2, rtol=0)
    torch.testing.assert_close(wide.positional_embedding[0], own.positional_embedding[0])


def test_trained_weights_that_cannot_be_had_are_random_ones_and_say_so(tiny_open_clip, caplog):
    tower = find_tower("open_clip:ViT-B-16:openai")(None)
    assert tower.weights == "random"
    assert [config.pretrained for config in tiny_open_clip] == ["openai", None]
    assert "open_clip:ViT-B-16:openai: no trained weights (The hub cannot be reached)" in caplog.text


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("test_vit", None, (2, 100, 64)),
        ("test_vit", ImageSize(96, 32), (2, 12, 64)),
        ("test_convnext", ImageSize(96, 64), (2, 6, 64)),
    ],
)
def test_timm(name, size, shape):
    tower = find_tower(f"timm:{name}")(size)
    assert tower.weights == "random" and tokens(tower).shape == shape
    assert tower.preprocess(Image.new("RGB", (300, 200))).shape[0] == 3


def test_timm_maps_with_channels_last_are_tokens_too():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1), embed_dim=24)
    module = library_towers.TimmTokens(model).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(module(pixels)[0, 8], model.forward_features(pixels)[0, 1, 1])
        assert module(pixels).shape == (1, 49, model.num_features)


def test_transformers_alone_or_inside_a_clip(tmp_path):
    CLIPModel(
        CLIPConfig(
            vision_config=TINY_VIT,
            text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50},
        )
    ).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(tmp_path / "clip")
    config = Dinov2WithRegistersConfig(**TINY_VIT)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    CLIPVisionConfig(**TINY_VIT).save_pretrained(tmp_path / "without_weights")
    for name, weights, has_processor in (("clip", "", True), ("dino", "", False), ("without_weights", "random", False)):
        loader = find_tower(f"hf:{tmp_path / name}")
        tower = loader(None)
        assert tower.weights == (weights or str(tmp_path / name))
        assert tokens(tower).shape == (2, 16, 32)  # neither class token nor registers
        assert tokens(loader(ImageSize(96, 64))).shape == (2, 24, 32)
        assert (tower.preprocess is not None) == has_processor
    saved = CLIPModel.from_pretrained(tmp_path / "clip").vision_model
    loaded = find_tower(f"hf:{tmp_path / 'clip'}")(None)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.module(pixels), saved(pixels).last_hidden_state[:, 1:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sparsformer:base",
            r"Tower 'sparsformer:base' is unknown. Did you mean 'sparseformer:base'\? Towers are demo",
        ),
        ("sparseformer:huge", "No published SparseFormer is named 'huge'"),
        ("demo:decoder", "Tower 'demo:decoder' is unknown"),
        ("/nowhere", "Tower '/nowhere' is unknown"),
        ("open_clip:ViT-L-41", "'ViT-L-41' is not a model name of open_clip. Did you mean"),
        ("open_clip:ViT-B-16:opena", "'opena' is no tag of open_clip's 'ViT-B-16'. Did you mean 'openai'"),
        ("timm:vit_bse_patch16_224", "not a model name of timm. Did you mean 'vit_base_patch16_224'"),
        ("timm:vit_base_patch16_224.nope", "'nope' is no tag of timm's 'vit_base_patch16_224'"),
        ("hf:/nowhere/at/all", "No configuration of transformers can be read at '/nowhere/at/all'"),
    ],
)
def test_unknown_names_are_refused_in_a_sentence(name, message):
    with pytest.raises(InputError, match=message) as caught:
        find_tower(name)
    assert "\n" not in str(caught.value)


def test_a_directory_with_something_else_is_refused(tmp_path):
    CLIPVisionConfig(**TINY_VIT).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a 'clip_vision_model' model, which is no SparseFormer"):
        find_tower(str(tmp_path))


def test_pixels_are_normalised_as_the_tower_wants(encoder_directory):
    tower = find_tower(str(encoder_directory))(None)
    grey = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    expected = (0.2 - torch.tensor(tower.mean)) / torch.tensor(tower.std)
    torch.testing.assert_close(tower.normalise(grey)[0, :, 1, 1], expected)
