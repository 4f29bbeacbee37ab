"""Stage one's images: found, split into training and held-out ones, laid out over the run."""

import logging
from pathlib import Path

from transformers import TrainingArguments

from sf_mllm.data.images import ImageFiles, TrainingImages, digest_names, find_images, hold_out
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap_config import BootstrapConfig
from sf_mllm.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def prepare_images(config: BootstrapConfig, run: RunFolder) -> tuple[ImageFiles, ImageFiles]:
    """List the files, draw the scenes first if they are wanted, and split them into (training, held-out).

    Raises:
        InputError: the folder cannot be used, or its files changed since the run began.
    """
    folder = config.data.images
    if folder == "scenes":
        folder = str(run.path / "scenes")
        draw_scenes(Path(folder), config)
    paths = find_images(folder)
    data = {"images": folder, "files": len(paths), "file_names_sha256": digest_names(paths, folder)}
    earlier = run.record.get("data")
    if earlier and earlier["file_names_sha256"] != data["file_names_sha256"]:
        raise InputError(
            f"The files in '{folder}' changed since this run began ({earlier['files']} then, {len(paths)} now); "
            "restore them or start a new run in another output_dir."
        )
    run.update_record(data=data)
    training, held_out = hold_out(paths, config.data.held_out, config.seed)
    share = config.data.max_unreadable_share
    return ImageFiles(training, share), ImageFiles(held_out, share)


def draw_scenes(folder: Path, config: BootstrapConfig) -> None:
    """Export the built-in scenes as an image folder, unless they are there."""
    from sf_mllm.data.scenes import export_scenes  # only runs on scenes need the renderer

    logger.info("Using %d built-in scenes in %s", config.data.scenes_count, folder)
    export_scenes(folder, count=config.data.scenes_count, seed=config.seed)


def order_images(files: ImageFiles, config: BootstrapConfig, arguments: TrainingArguments) -> TrainingImages:
    """Lay out the crops of the whole run; a number of epochs becomes a number of steps in `arguments`."""
    batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0:
        arguments.max_steps = max(1, round(arguments.num_train_epochs * len(files) / batch_size))
    return TrainingImages(
        files,
        num_samples=arguments.max_steps * batch_size,
        resolution=config.data.resolution,
        min_crop_area=config.data.min_crop_area,
        flip=config.data.flip,
        seed=config.seed,
    )
