"""Stage one's images: found, split into training and held-out ones, laid out over the run."""

import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from sf_mllm.cores import count_cores
from sf_mllm.data.augment import CropSettings, RandomViews, Views, parse_resolutions
from sf_mllm.data.image_sources import ImagesInMemory, ImageSource, digest
from sf_mllm.data.image_specs import open_images
from sf_mllm.data.image_streams import ShardSizes, StreamedImages
from sf_mllm.data.images import HeldOutImages, TrainingImages, hold_out
from sf_mllm.data.shared_log import SharedLog, UnreadableImages
from sf_mllm.data.tar_shards import TarShards
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import BootstrapConfig, DataConfig
from sf_mllm.training.run_folder import RunFolder, is_main_process

logger = logging.getLogger(__name__)

_MAX_WORKERS = 8
_UNREADABLE_FILE = "unreadable_images.jsonl"
_SHARD_SIZES_FILE = "shard_sizes.jsonl"


@dataclass(frozen=True)
class RunImages:
    """What a run trains on and what it is measured on."""

    source: ImageSource | TarShards
    training: np.ndarray
    """Numbers of the images, or of the shards, of `source` to train on."""
    held_out_source: ImageSource
    held_out: np.ndarray
    """Numbers of the images of `held_out_source` to measure on."""
    fingerprint: str
    """Changes when images come, go or are exchanged."""

    @property
    def num_images(self) -> int:
        """Training and held-out images; of shards, whose images nobody has counted, the held-out ones."""
        return len(self.held_out) + (0 if isinstance(self.source, TarShards) else len(self.training))

    def __str__(self) -> str:
        return f"{len(self.source)} {'tar shards' if isinstance(self.source, TarShards) else 'images'}"


def loader_defaults(train: dict[str, Any]) -> dict[str, Any]:
    """Return the section `train` with a number of workers where it has none: one a core of this process, at most 8.

    Raises:
        InputError: workers shall outlive a pass over the images.
    """
    if train.get("dataloader_persistent_workers"):
        raise InputError(
            "train.dataloader_persistent_workers cannot be set for a bootstrap run; it reads its images in one pass, "
            "so its workers live as long as training does."
        )
    cores = count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"dataloader_num_workers": max(0, min(_MAX_WORKERS, cores - 1)), **train}


def crop_settings(data: DataConfig) -> CropSettings:
    """Return how a configuration wants images to be cut."""
    resolutions = data.resolutions if data.resolutions is not None else [data.resolution]
    return CropSettings(
        min_crop_area=data.min_crop_area,
        max_aspect_ratio=data.max_aspect_ratio,
        flip=data.flip,
        color_jitter=data.color_jitter,
        resolutions=parse_resolutions(resolutions),
    )


def find_run_images(config: BootstrapConfig, scenes_folder: Path) -> RunImages:
    """Find the images that a configuration names and split them; nothing is decoded.

    Args:
        config: of the run.
        scenes_folder: where the built-in scenes are drawn if they are wanted.

    Raises:
        InputError: they cannot be used, or there are too few.
    """
    data = config.data
    source = open_images(_spell_out(data.images, config, scenes_folder), data.image_column)
    held_out_source = _open_held_out(config, source)
    fingerprint = source.fingerprint
    if held_out_source is not None:
        fingerprint = digest(fingerprint, held_out_source.fingerprint)
        training = np.arange(len(source))
        held_out = np.arange(len(held_out_source))
        if len(held_out) > data.held_out:
            held_out = hold_out(len(held_out_source), data.held_out, data.seed)[1]
    elif isinstance(source, TarShards):
        if len(source) < 2:
            raise InputError(
                f"'{source.urls[0]}' is one tar shard and the last one is held out; give two or more, or set "
                "data.held_out_images to other images."
            )
        training = np.arange(len(source) - 1)
        held_out_source = _read_ahead(source, len(source) - 1, data.held_out)
        held_out = np.arange(len(held_out_source))
    else:
        held_out_source = source
        training, held_out = hold_out(len(source), data.held_out, data.seed)
    if len(held_out) < 2:
        raise InputError(
            f"There is {len(held_out)} held-out image, but regions are compared between two or more; set "
            "data.held_out_images to more images."
        )
    return RunImages(source, training, held_out_source, held_out, fingerprint)


def prepare_images(config: BootstrapConfig, run: RunFolder) -> RunImages:
    """Find a run's images, note what they are, and make sure that they are those it began with.

    Raises:
        InputError: they cannot be used or changed since the run began.
    """
    images = find_run_images(config, run.path / "scenes")
    earlier = run.record.get("data")
    if earlier and earlier["fingerprint"] != images.fingerprint:
        raise InputError(
            f"The images of '{config.data.images}' changed since this run began ({earlier['images']} then, {images} "
            "now); restore them or start a new run in another output_dir."
        )
    if is_main_process() and run.find_last_checkpoint() is None:  # what an earlier start noted may be of other images
        for name in (_UNREADABLE_FILE, _SHARD_SIZES_FILE):
            (run.path / name).unlink(missing_ok=True)
    if not earlier:
        run.update_record(data={"images": str(images), "fingerprint": images.fingerprint})
    return images


def make_datasets(
    images: RunImages, config: BootstrapConfig, run: RunFolder, arguments: TrainingArguments, views: Views | None = None
) -> tuple[TrainingImages | StreamedImages, HeldOutImages]:
    """Lay out the crops of the whole run; a number of epochs becomes a number of steps in `arguments`.

    Args:
        images: of the run.
        config: of the run.
        run: its folder; the readers' notes are kept there.
        arguments: how many samples a step and the run have.
        views: how an image becomes a sample; by default random crops.

    Raises:
        InputError: the number of steps is not known.
    """
    settings = crop_settings(config.data)
    views = views or RandomViews(settings, config.seed)
    unreadable = UnreadableImages(SharedLog(run.path / _UNREADABLE_FILE), config.data.max_unreadable_share)
    step_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0:
        if isinstance(images.source, TarShards):
            raise InputError(
                "train.num_train_epochs needs the number of images, which tar shards do not tell; set train.max_steps."
            )
        arguments.max_steps = max(1, round(arguments.num_train_epochs * len(images.training) / step_size))
    common: dict[str, Any] = {
        "num_samples": arguments.max_steps * step_size,
        "step_size": step_size,
        "views": views,
        "resolutions": settings.resolutions,
        "seed": config.seed,
        "unreadable": unreadable,
    }
    training: TrainingImages | StreamedImages
    if isinstance(images.source, TarShards):
        training = StreamedImages(
            images.source,
            [int(number) for number in images.training],
            num_lanes=_count_lanes(run, arguments, len(images.training)),
            block=arguments.train_batch_size,
            shuffle_buffer=config.data.shuffle_buffer,
            sizes=ShardSizes(SharedLog(run.path / _SHARD_SIZES_FILE)),
            **common,
        )
    else:
        training = TrainingImages(images.source, images.training, num_images=images.num_images, **common)
    held_out = HeldOutImages(
        images.held_out_source,
        images.held_out,
        views=views,
        resolution=(config.data.resolution, config.data.resolution),
        unreadable=unreadable,
        num_images=images.num_images,
    )
    return training, held_out


def _spell_out(images: Any, config: BootstrapConfig, scenes_folder: Path) -> list[str]:
    """Return the descriptions of images as a list, and the folder of the built-in scenes in place of their name."""
    specs = _as_list(images)
    if "scenes" in specs:
        draw_scenes(scenes_folder, config.data)
    return [str(scenes_folder) if spec == "scenes" else spec for spec in specs]


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images]


def draw_scenes(folder: Path, data: DataConfig) -> None:
    """Export the built-in scenes as an image folder, unless they are there."""
    from sf_mllm.data.scenes.export import export_scenes  # only runs on scenes need the renderer

    logger.info("Using %d built-in scenes in %s", data.scenes_count, folder)
    export_scenes(folder, count=data.scenes_count, seed=data.seed, domain=data.scenes_domain)


def _open_held_out(config: BootstrapConfig, training: ImageSource | TarShards) -> ImageSource | None:
    """Open `data.held_out_images`, if there are any."""
    data = config.data
    if data.held_out_images is None:
        return None
    if "scenes" in _as_list(data.held_out_images):
        raise InputError("data.held_out_images cannot be 'scenes'; export some with python -m sf_mllm.data.scenes DIR.")
    source = open_images(_as_list(data.held_out_images), data.image_column)
    if source.fingerprint == training.fingerprint:
        raise InputError("data.held_out_images are the training images; leave it out to hold some of them out.")
    return _read_ahead(source, 0, data.held_out) if isinstance(source, TarShards) else source


def _read_ahead(shards: TarShards, first: int, count: int) -> ImagesInMemory:
    """Keep the first images of a shard, and of those after it, in memory."""
    images = itertools.chain.from_iterable(shards.read(number) for number in range(first, len(shards)))
    return ImagesInMemory(list(itertools.islice(images, count)), shards.fingerprint)


def _count_lanes(run: RunFolder, arguments: TrainingArguments, num_shards: int) -> int:
    """Return among how many readers the shards are dealt: that of the run's first start, for all of its starts."""
    readers = arguments.world_size * max(1, arguments.dataloader_num_workers)
    lanes = run.record.get("shard_readers", readers)
    run.update_record(shard_readers=lanes)
    if lanes % readers:
        logger.warning(
            "This run's shards are dealt to %d readers (processes x workers) and there are %d now: it sees the same "
            "images, but reads shards several times; a divisor of %d is faster.",
            lanes,
            readers,
            lanes,
        )
    if num_shards < lanes:
        logger.warning(
            "%d tar shards are fewer than the %d readers (processes x workers): some images come again before others "
            "were seen; make more shards or lower train.dataloader_num_workers.",
            num_shards,
            lanes,
        )
    return lanes
