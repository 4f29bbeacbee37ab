"""Towers of open_clip, timm and transformers; for another size their position embedding is resized by the library."""

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import open_clip
import timm
import torch
from open_clip.model import resize_pos_embed
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from sf_mllm.bench.our_towers import preprocess_with
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.tower import RANDOM, Tower, TowerLoader
from sf_mllm.constants import CLIP_MEAN, CLIP_STD
from sf_mllm.errors import InputError, first_line, nearest
from sf_mllm.training.bootstrap.config import TeacherConfig
from sf_mllm.training.bootstrap.teachers import load_clip, resolve_model

logger = logging.getLogger(__name__)
LoadedT = TypeVar("LoadedT")


class OpenClipTokens(nn.Module):
    """All patches behind the last block and the final norm of open_clip's own ViT."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.visual.output_tokens = True

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, patches, D]."""
        return self.visual(pixel_values)[1]


class TimmTokens(nn.Module):
    """All patches, or places of the last feature map, of a timm model, without class and register tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        self.is_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, patches, D]."""
        features = self.model.forward_features(pixel_values)
        if features.dim() == 3:
            return features[:, self.num_prefix_tokens :]
        return features.flatten(1, 2) if self.is_channels_last else features.flatten(2).transpose(1, 2)


class HfTokens(nn.Module):
    """All patches of a vision model of transformers, without class and register tokens.

    Args:
        model: the vision model.
        size: of the images.
    """

    def __init__(self, model: Any, size: ImageSize) -> None:
        super().__init__()
        self.model = model
        patch = getattr(model.config, "patch_size", None)
        own = getattr(model.config, "image_size", None)
        self.num_patches = (size.width // patch) * (size.height // patch) if isinstance(patch, int) else None
        takes_any = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.settings = {"interpolate_pos_encoding": True} if takes_any and (own, own) != tuple(size) else {}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, patches, D]."""
        features = self.model(pixel_values, **self.settings).last_hidden_state
        if features.dim() == 4:
            return features.flatten(2).transpose(1, 2)
        return features if self.num_patches is None else features[:, -self.num_patches :]


def find_open_clip_tower(name: str) -> TowerLoader:
    """Look a model of open_clip up: "MODEL" with random weights, "MODEL:TAG" with trained ones, or "demo:clip".

    Raises:
        InputError: there is no such model or tag.
    """
    brings_weights = resolve_model(name) != name
    model, _, tag = (name, "", "") if brings_weights else name.partition(":")
    if not brings_weights:
        _refuse_unknown(model, open_clip.list_models(), "open_clip")
        if tag:
            tags = open_clip.list_pretrained_tags_by_model(model)
            if tag not in tags:
                raise InputError(
                    f"'{tag}' is no tag of open_clip's '{model}'.{nearest(tag, tags)} "
                    f"Tags: {', '.join(tags) or 'none'}."
                )

    def load(size: ImageSize | None) -> Tower:
        def build(pretrained: str | None) -> Any:
            return load_clip(TeacherConfig(model=model, pretrained=pretrained))

        clip, weights = _build(name if brings_weights else f"open_clip:{name}", build, tag or None)
        visual = clip.visual
        if not hasattr(visual, "trunk") and not hasattr(visual, "transformer"):
            raise InputError(f"open_clip's '{model}' has a {type(visual).__name__}, which gives no tokens; take a ViT.")
        settings = visual.preprocess_cfg
        sides = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
        own = ImageSize(sides[1], sides[0])
        if size is not None and size != own:
            _resize_clip(clip, size)
        return Tower(
            module=TimmTokens(visual.trunk) if hasattr(visual, "trunk") else OpenClipTokens(visual),
            weights=name if brings_weights else weights,
            size=size or own,
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            preprocess=image_transform_v2(PreprocessCfg(**settings), is_train=False),
        )

    return load


def find_timm_tower(name: str) -> TowerLoader:
    """Look a model of timm up: "MODEL" with random weights, "MODEL.TAG" with trained ones.

    Raises:
        InputError: there is no such model or tag.
    """
    model, _, tag = name.partition(".")
    _refuse_unknown(model, timm.list_models(), "timm")
    if tag:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
        if tag not in tags:
            raise InputError(
                f"'{tag}' is no tag of timm's '{model}'.{nearest(tag, tags)} Tags: {', '.join(tags) or 'none'}."
            )

    def load(size: ImageSize | None) -> Tower:
        def build(pretrained: str | None) -> Any:
            return timm.create_model(name if pretrained else model, pretrained=bool(pretrained), num_classes=0)

        vit, weights = _build(f"timm:{name}", build, tag or None)
        settings = timm.data.resolve_model_data_config(vit)
        own = ImageSize(settings["input_size"][2], settings["input_size"][1])
        if size is not None and size != own:
            _resize_timm(vit, size)
        return Tower(
            module=TimmTokens(vit),
            weights=weights,
            size=size or own,
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            preprocess=timm.data.create_transform(**settings, is_training=False),
        )

    return load


def find_hf_tower(name: str) -> TowerLoader:
    """Look a vision model of transformers up, alone or inside a CLIP-like or LLaVA-like model.

    Args:
        name: directory, or id of a repository on the hub. Weights that cannot be had are random.

    Raises:
        InputError: its configuration cannot be had, or is none of a vision model.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a broken file makes the reader stumble in many ways, and so does the hub
        raise InputError(
            f"No configuration of transformers can be read at '{name}': {first_line(error)}; give a directory with a "
            "config.json or an id such as openai/clip-vit-large-patch14-336."
        ) from error
    config = getattr(config, "vision_config", config)
    own = getattr(config, "image_size", 224)
    if not isinstance(own, int):
        own = own[0]

    def load(size: ImageSize | None) -> Tower:
        chosen = size or ImageSize(own, own)
        model, weights = _build(f"hf:{name}", lambda trained: _load_hf(name, config, trained), name)
        processor = _load_hf_processor(name)
        return Tower(
            module=HfTokens(model, chosen),
            weights=weights,
            size=chosen,
            mean=tuple(getattr(processor, "image_mean", None) or CLIP_MEAN),
            std=tuple(getattr(processor, "image_std", None) or CLIP_STD),
            preprocess=None if processor is None else preprocess_with(processor),
        )

    return load


def _resize_clip(clip: Any, size: ImageSize) -> None:
    """Let the image tower of an open_clip model see images of another size, its position embedding resized."""
    visual = clip.visual
    if hasattr(visual, "trunk"):
        _resize_timm(visual.trunk, size)
        return
    visual.grid_size = (size.height // visual.patch_size[0], size.width // visual.patch_size[1])
    state = {"visual.positional_embedding": visual.positional_embedding.detach()}
    resize_pos_embed(state, clip)
    visual.positional_embedding = nn.Parameter(state["visual.positional_embedding"])


def _resize_timm(model: Any, size: ImageSize) -> None:
    """The same for timm, whose convolutional networks take any size as they are."""
    if hasattr(model, "set_input_size"):
        model.set_input_size((size.height, size.width))


def _load_hf(name: str, config: Any, trained: str | None) -> nn.Module:
    if trained is None:
        return AutoModel.from_config(config)
    loaded: Any = AutoModel.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise RuntimeError(f"{len(missing)} of its weights are missing, {missing[0]} among them")
    return model


def _load_hf_processor(name: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception:  # there is none, or one that its class cannot read: the tower itself can be measured
        return None


def _build(name: str, build: Callable[[str | None], LoadedT], trained: str | None) -> tuple[LoadedT, str]:
    """Build a model with trained weights if they are wanted and can be had, else with the same random ones each time.

    Args:
        name: of the tower.
        build: takes what is to be loaded; None: random weights.
        trained: where trained weights come from, or None.

    Returns:
        The model, and where its weights come from.

    Raises:
        InputError: the model cannot be built at all.
    """
    if trained is not None:
        try:
            return build(trained), trained
        except InputError:
            raise
        except Exception as error:  # libraries, their file readers and the hub raise almost any type here
            logger.warning("%s: no trained weights (%s); taking random ones.", name, first_line(error))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return build(None), RANDOM
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Tower '{name}' cannot be built: {first_line(error)}.") from error


def _refuse_unknown(model: str, known: list[str], library: str) -> None:
    if model not in known:
        raise InputError(f"'{model}' is not a model name of {library}.{nearest(model, known)}")
