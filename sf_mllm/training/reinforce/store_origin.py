"""What decides the content of a teacher store; the maker writes it down and a run that reads it compares."""

import hashlib
import logging
from typing import Any

import torch

from sf_mllm.data.teacher_store import StoredViews, TeacherStore
from sf_mllm.encoder.weights_vit import describe_vit
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.images import RunImages, crop_settings
from sf_mllm.training.bootstrap.teachers import Teacher

logger = logging.getLogger(__name__)


def open_stored_views(config: BootstrapConfig, teacher: Teacher, images: RunImages) -> StoredViews | None:
    """Open the store that a run names, if it names one.

    Raises:
        InputError: it cannot be used, or belongs to a run with another teacher, other images or other crops.
    """
    if config.store.path is None:
        return None
    origin = describe_origin(config, teacher, images.fingerprint)
    store = TeacherStore.open(config.store.path)
    store.refuse_other_origin(origin)
    logger.info("The teacher's outputs come from %s: %s.", store.directory, store)
    return StoredViews(store, config.data.color_jitter)


def describe_origin(config: BootstrapConfig, teacher: Teacher, images: str) -> dict[str, Any]:
    """Name everything that two runs must share to use one store.

    The data's seed is part of it, since it decides which images are held out and how the others are cut.

    Args:
        config: of either run.
        teacher: its teacher.
        images: fingerprint of the images, see `RunImages`.

    Returns:
        {what: value}, in words that can stand in a sentence.

    Raises:
        InputError: crops of several sizes are wanted; a stored crop has one.
    """
    settings = crop_settings(config.data)
    if len(settings.resolutions) > 1:
        raise InputError(
            f"data.resolutions lists {len(settings.resolutions)} sizes, but the crops of a teacher store have one; "
            "list one, or set store.path=null."
        )
    preprocessing = teacher.preprocessing
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return {
        "the teacher's weights": fingerprint_teacher(teacher),
        "the teacher's preprocessing": f"{preprocessing.image_size} px, mean {mean}, deviation {std}",
        "the images": images[:16],
        "data.seed": config.data.seed,
        "data.held_out": config.data.held_out,
        "data.resolution": config.data.resolution,
        "data.resolutions": [list(resolution) for resolution in settings.resolutions],
        "data.min_crop_area": settings.min_crop_area,
        "data.max_aspect_ratio": settings.max_aspect_ratio,
        "data.flip": settings.flip,
        "data.color_jitter": settings.color_jitter,
    }


def fingerprint_teacher(teacher: Teacher) -> str:
    """Start of a SHA-256 over a teacher's weights and over what its blocks compute with them."""
    vit = describe_vit(teacher.vit)
    digest = hashlib.sha256(f"{vit.num_heads} {vit.hidden_act} {vit.layer_norm_eps} {vit.pooling}".encode())
    for name, tensor in sorted(teacher.vit.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
