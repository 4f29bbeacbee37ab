"""Teachers of the bootstrap stage: open_clip CLIPs and timm ViTs behind one small interface."""

import logging
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import open_clip
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sf_mllm.assets import resolve_demo
from sf_mllm.encoder.vit_timm import read_class_names
from sf_mllm.errors import InputError, first_line, nearest
from sf_mllm.training.bootstrap.config import TeacherConfig

logger = logging.getLogger(__name__)

_DIRECTORY_SCHEMES = ("local-dir:", "hf-hub:")
"""Prefixes with which open_clip and timm take configuration and weights from one place."""
_LONGEST_REASON = 300
"""Characters of a library's message that are passed on: PyTorch lists every key that does not fit."""


OutputKind = Literal["embedding", "logits"]
"""What a teacher says of an image: a point in a space, or scores of classes."""


class TeacherOutput(NamedTuple):
    """`embedding` [B, proj] and the normalised last `feature_map` [B, D, h, w], without class or register tokens.

    The `embedding` of a teacher whose `output_kind` is "logits" are its logits.
    """

    embedding: Tensor
    feature_map: Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher's images are made: shorter side to `image_size`, then normalised by `mean` and `std`."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class OpenClipTeacher(nn.Module):
    """Image tower of an open_clip CLIP, frozen."""

    visual: Any
    output_kind: OutputKind = "embedding"

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.visual = clip.visual
        self.requires_grad_(False)
        self.preprocessing = _read_preprocessing(self.visual.preprocess_cfg, self.visual.image_size)
        self.eval()

    @property
    def vit(self) -> nn.Module:
        """What `SparseFormerModel.from_vit` takes."""
        return self.visual

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> TeacherOutput:
        """Encode normalised pixels [B, 3, H, W] of the teacher's own size."""
        output = self.visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, output_fmt="NCHW"
        )
        # Only a timm trunk has a norm that `normalize_intermediates` leaves out.
        norm = getattr(getattr(self.visual, "trunk", None), "fc_norm", nn.Identity())
        return TeacherOutput(output["image_features"], _normalise_map(output["image_intermediates"][-1], norm))


class TimmTeacher(nn.Module):
    """A timm `VisionTransformer` or `Eva`, frozen.

    Its embedding is what its head returns: logits, the CLIP space for CLIP weights, the pooled features without a head.
    """

    vit: Any

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.output_kind: OutputKind = "embedding" if read_class_names(vit) is None else "logits"
        self.requires_grad_(False)
        self.preprocessing = _read_preprocessing(vit.pretrained_cfg, vit.patch_embed.img_size)
        self.eval()

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> TeacherOutput:
        """Encode normalised pixels [B, 3, H, W] of the teacher's own size."""
        tokens, maps = self.vit.forward_intermediates(pixel_values, indices=1, norm=True, output_fmt="NCHW")
        return TeacherOutput(self.vit.forward_head(tokens), _normalise_map(maps[-1], self.vit.fc_norm))


Teacher = OpenClipTeacher | TimmTeacher


def load_teacher(config: TeacherConfig) -> Teacher:
    """Build the teacher that a run names, with its weights, in fp32 on the CPU.

    Raises:
        InputError: the name, the tag or the weights cannot be used; names the nearest valid one where there is one.
    """
    if config.pretrained is None and not _brings_its_weights(config.model) and not config.allow_random:
        raise InputError(
            f"Teacher '{config.model}' has no weights: set teacher.pretrained to a tag or a local file "
            "(teacher.allow_random=true takes random weights, for tests)."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            # Random weights, too, must be the same in all processes of a run and after a resume.
            torch.default_generator.manual_seed(0)
            teacher: Teacher = _LOADERS[config.source](config)
    except InputError:
        raise
    except Exception as error:  # both libraries, their file readers and the hub raise almost any type here
        raise InputError(
            f"Teacher '{config.model}' (pretrained={config.pretrained}) cannot be loaded by {config.source}: "
            f"{_reason(error)}."
        ) from error
    if config.pretrained is None and not _brings_its_weights(config.model):
        logger.warning("The teacher has random weights; its student learns nothing of use.")
    return teacher


def load_clip(config: TeacherConfig) -> Any:
    """Build a whole open_clip model, text tower included; `load_teacher` says what goes wrong in words."""
    model = resolve_model(config.model)
    if model.startswith(_DIRECTORY_SCHEMES):
        return open_clip.create_model(model, require_pretrained=True, force_image_size=config.image_size)
    _refuse_unknown(model, open_clip.list_models(), "open_clip")
    if config.pretrained is None:
        # Without weights nothing ties it to the CPU: under `torch.device("meta")` a size can be tried for free.
        device = torch.get_default_device()
        return open_clip.create_model(model, device=device, force_image_size=config.image_size)
    path = Path(config.pretrained)
    if path.is_file():
        if path.suffix != ".npz":  # NumPy's archives hold no code, and open_clip checks their layout
            _read_weights(path)
    else:
        tags = open_clip.list_pretrained_tags_by_model(model)
        if config.pretrained not in tags:
            raise InputError(
                f"'{config.pretrained}' is neither a file nor a tag of open_clip's '{model}'."
                f"{nearest(config.pretrained, tags)} Tags: {', '.join(tags) or 'none'}."
            )
        # The activation is not in the weights; open_clip only warns, and the teacher would be silently worse.
        # The other way round nothing is known: tags without that setting may be of either kind.
        needs_quick_gelu = open_clip.get_pretrained_cfg(model, config.pretrained).get("quick_gelu", False)
        if needs_quick_gelu and not (open_clip.get_model_config(model) or {}).get("quick_gelu", False):
            raise _plain_gelu(config, f"{model}-quickgelu")
    return open_clip.create_model(model, config.pretrained, require_pretrained=True, force_image_size=config.image_size)


def _load_timm(config: TeacherConfig) -> TimmTeacher:
    model = resolve_model(config.model)
    if model.startswith(_DIRECTORY_SCHEMES):
        vit = timm.create_model(model, pretrained=True)
    else:
        _refuse_unknown(model.partition(".")[0], timm.list_models(), "timm")
        if config.pretrained is None:
            vit = timm.create_model(model)
        elif Path(config.pretrained).is_file():
            num_classes = _count_classes(Path(config.pretrained))
            vit = timm.create_model(model, num_classes=num_classes, checkpoint_path=config.pretrained)
        else:
            known = [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]
            if config.pretrained not in known:
                raise InputError(
                    f"'{config.pretrained}' is neither a file nor a tag of timm's '{model}'."
                    f"{nearest(config.pretrained, known)} Tags: {', '.join(known) or 'none'}."
                )
            # The activation is not in the weights; timm only notes it.
            settings = timm.get_pretrained_cfg(f"{model}.{config.pretrained}", allow_unregistered=False)
            notes = " ".join(settings.notes or ()) if settings is not None else ""
            if "natively QuickGELU" in notes and "quickgelu" not in model:
                raise _plain_gelu(config, model.replace("_clip_", "_clip_quickgelu_"))
            vit = timm.create_model(f"{model}.{config.pretrained}", pretrained=True)
    if not isinstance(vit, VisionTransformer | Eva):
        raise InputError(f"timm's '{model}' is a {type(vit).__name__}; only VisionTransformer models can be teachers.")
    if config.image_size is not None:
        vit.set_input_size((config.image_size, config.image_size))
    return TimmTeacher(vit)


_LOADERS: dict[str, Callable[[TeacherConfig], Teacher]] = {
    "open_clip": lambda config: OpenClipTeacher(load_clip(config)),
    "timm": _load_timm,
}


def _reason(error: Exception) -> str:
    """Say in a few words why a library failed, without the advice to run what is in a file."""
    if "weights_only" in str(error):
        return "its file of weights holds code, which is not run"
    return textwrap.shorten(first_line(error), _LONGEST_REASON, placeholder=" ...")


def _count_classes(path: Path) -> int:
    """Classes of the head in a file of weights, 0 if it has none; timm by itself expects those of the model's name."""
    if path.suffix == ".npz":  # as Google published them
        with np.load(path) as arrays:
            return len(arrays["head/bias"]) if "head/bias" in arrays else 0
    head = _read_weights(path).get("head.weight")
    return 0 if head is None else len(head)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code, and say in words of ours what the libraries stumble over.

    Raises:
        InputError: the file holds something else.
    """
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception:  # damaged files fail with almost any type
        weights = {}
    if not weights or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(
            f"'{path}' is damaged or no file of weights; give a state dict, as .safetensors or saved by torch.save: "
            "files that hold code (TorchScript, pickled objects) are not opened."
        )
    return weights


def _plain_gelu(config: TeacherConfig, twin: str) -> InputError:
    return InputError(
        f"The weights '{config.pretrained}' were trained with quick GELU, the architecture '{config.model}' uses plain "
        f"GELU; set teacher.model={twin}."
    )


def resolve_model(model: str) -> str:
    """Return the name under which open_clip and timm know a model: "demo:..." becomes the directory that ships."""
    path = resolve_demo(model)
    return path if path == model else f"local-dir:{path}"


def _brings_its_weights(model: str) -> bool:
    return resolve_model(model).startswith(_DIRECTORY_SCHEMES)


def _refuse_unknown(model: str, known: list[str], library: str) -> None:
    if model not in known:
        raise InputError(
            f"'{model}' is not a model name of {library}.{nearest(model, known)} "
            "A directory is given as local-dir:PATH, a hub repository as hf-hub:OWNER/NAME."
        )


def _normalise_map(feature_map: Tensor, fc_norm: nn.Module) -> Tensor:
    """Apply timm's `fc_norm` at each place of [B, D, h, w].

    Models that pool by mean keep their one final norm there, in the head; the student has it before its tokens come
    out. In all other models it is an identity.
    """
    return fc_norm(feature_map.movedim(1, -1)).movedim(-1, 1).contiguous()


def _read_preprocessing(settings: dict[str, Any], image_size: int | tuple[int, int]) -> Preprocessing:
    size = image_size if isinstance(image_size, int) else image_size[0]
    if not isinstance(image_size, int) and image_size[0] != image_size[1]:
        raise InputError(f"A teacher must see square images, this one sees {image_size[0]}x{image_size[1]}.")
    return Preprocessing(size, tuple(settings["mean"]), tuple(settings["std"]))
