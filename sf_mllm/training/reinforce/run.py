"""From a run's configuration to a teacher store: every image is decoded once, every stored crop seen once."""

import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from sf_mllm.data.augment import Crop, ImageKey, Resolution
from sf_mllm.data.group_crops import (
    Chunk,
    GroupCrops,
    HeldOutGroup,
    ImageGroups,
    NumberedGroups,
    RandomCrops,
    ShardGroups,
    WholeImage,
)
from sf_mllm.data.quantised_patches import quantise, rounding_error
from sf_mllm.data.tar_shards import TarShards
from sf_mllm.data.teacher_store import bytes_per_crop
from sf_mllm.data.teacher_store_writer import StoreWriter
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.images import RunImages, crop_settings, find_run_images, loader_defaults
from sf_mllm.training.bootstrap.task import BootstrapTask
from sf_mllm.training.bootstrap.teachers import TeacherOutput, load_teacher
from sf_mllm.training.reinforce.progress import ReinforceProgress
from sf_mllm.training.reinforce.store_origin import describe_origin
from sf_mllm.training.run_folder import strip_worker_traceback

logger = logging.getLogger(__name__)

_FIRST_IMAGES = 1000
"""The share of unreadable images is taken of at least so many where nobody has counted the images."""


def make_store(config: BootstrapConfig) -> Path:
    """Make the store that a configuration names, or go on making it; return its directory.

    Under torchrun each process makes its share of the groups; the one that ends last completes the store.

    Raises:
        InputError: something that the configuration names cannot be used.
    """
    if config.store.path is None:
        raise InputError("store.path is not set; name the directory of the store, for example store.path=runs/store.")
    directory = Path(config.store.path)
    settings = crop_settings(config.data)
    teacher = load_teacher(config.teacher)
    arguments = make_training_arguments(loader_defaults(config.train), directory, config.seed)
    with arguments.main_process_first(local=False, desc="beginning a store"):
        images = find_run_images(config, Path(config.output_dir) / "scenes")
        training = _training_groups(images)
        writer = StoreWriter(
            directory,
            describe_origin(config, teacher, images.fingerprint),
            layout={"store.crops": config.store.crops, "store.grid": config.store.grid},
            groups=training.names,
        )
    maker = _StoreMaker(
        writer,
        BootstrapTask(teacher, config.loss),
        arguments,
        config,
        num_images=None if isinstance(images.source, TarShards) else images.num_images,
    )
    try:
        held_out = HeldOutGroup(images.held_out_source, images.held_out)
        maker.make(held_out, WholeImage(), (config.data.resolution, config.data.resolution))
        crops = RandomCrops(settings, config.data.seed, config.store.crops)
        maker.make(training, crops, settings.resolutions[0])
    except InputError as error:
        raise InputError(strip_worker_traceback(str(error))) from error
    content = writer.finish()
    if content is None:
        logger.info("This process has made its share of %s; others have not made theirs yet.", directory)
    else:
        logger.info(
            "%s holds %d crops of %d images in %.3g GB; %d images could not be read.",
            directory,
            content["crops"],
            content["images"],
            content["bytes"] / 1e9,
            content["unreadable_images"],
        )
    return directory


def _training_groups(images: RunImages) -> ImageGroups:
    if isinstance(images.source, TarShards):
        return ShardGroups(images.source, images.training.tolist())
    return NumberedGroups(images.source, images.training)


@dataclass(eq=False)
class _Part:
    """A group under way."""

    group: str
    keys: list[ImageKey] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    crops: list[list[Crop]] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    """Of the teacher, on its device; [n, K, ...] each."""
    num_unreadable: int = 0
    num_waiting: int = 0
    """Images that the teacher has not seen."""
    num_finished: int = 0
    """Workers that have nothing to add."""


class _Waiting(NamedTuple):
    """An image that the teacher has not seen."""

    part: _Part
    pixel_values: Tensor


class _StoreMaker:
    """Shows the crops of groups to a teacher and writes what it says.

    Args:
        writer: of the store.
        task: asks the teacher.
        arguments: device, batch size, precision, workers and processes.
        config: of the store.
        num_images: training and held-out images together; None if nobody has counted them.
    """

    def __init__(
        self,
        writer: StoreWriter,
        task: BootstrapTask,
        arguments: TrainingArguments,
        config: BootstrapConfig,
        num_images: int | None,
    ) -> None:
        self.writer, self.task, self.arguments, self.config = writer, task, arguments, config
        self.num_images = num_images
        self.num_seen = self.num_unreadable = 0
        task.teacher.to(arguments.device)
        if arguments.torch_compile:
            task.teacher.compile(backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)
        self.has_described_cost = False

    def make(self, groups: ImageGroups, crops: RandomCrops | WholeImage, resolution: Resolution) -> None:
        """Write those of this process's groups that are missing.

        Raises:
            InputError: too many images cannot be read.
        """
        missing = set(self.writer.missing)
        # Shared out before the missing ones are picked, since another process may be writing already.
        mine = groups.names[self.arguments.process_index :: self.arguments.world_size]
        names = [name for name in mine if name in missing]
        if len(names) < len(mine):
            logger.info("%d of %d groups are there already.", len(mine) - len(names), len(mine))
        if not names:
            return
        num_workers = self.arguments.dataloader_num_workers
        dataset = GroupCrops(
            groups, names, crops=crops, resolution=resolution, color_jitter=self.config.data.color_jitter
        )
        progress = ReinforceProgress(len(names), len(groups.names), groups.num_images, crops.count)
        # Whole images and random crops fill equal batches, so that a compiled teacher is compiled once.
        num_crops = self.config.store.crops
        batch_size = max(num_crops, self.arguments.per_device_eval_batch_size // num_crops * num_crops)
        shape = (batch_size // crops.count, crops.count, 3, *resolution)
        parts: dict[str, _Part] = {}
        waiting: list[_Waiting] = []
        written: Future[None] | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:  # the teacher goes on while a file is written
            for chunk in itertools.chain(DataLoader(dataset, batch_size=None, num_workers=num_workers), [None]):
                if chunk is not None:
                    part = parts.setdefault(chunk.group, _Part(chunk.group))
                    self._take(chunk, part)
                    waiting += [_Waiting(part, pixels) for pixels in chunk.pixel_values]
                    progress.add(len(chunk.keys))
                while len(waiting) >= shape[0] or (waiting and chunk is None):
                    self._ask(waiting[: shape[0]], shape)
                    waiting = waiting[shape[0] :]
                for part in [p for p in parts.values() if p.num_finished == max(1, num_workers) and not p.num_waiting]:
                    if not part.outputs:  # no image can be read; the sizes are wanted all the same
                        part.outputs.append(self._encode(torch.zeros(shape, dtype=torch.uint8), 0))
                    if written is not None:
                        written.result()
                    written = pool.submit(self._write, parts.pop(part.group), progress)
            if written is not None:
                written.result()
        progress.report()

    def _take(self, chunk: Chunk, part: _Part) -> None:
        """Note what a chunk adds to its group.

        Raises:
            InputError: too many images cannot be read.
        """
        part.keys += chunk.keys
        part.sizes += chunk.sizes
        part.crops += chunk.crops
        part.num_waiting += len(chunk.keys)
        part.num_unreadable += chunk.num_unreadable
        part.num_finished += chunk.is_last
        self.num_seen += len(chunk.keys) + chunk.num_unreadable
        self.num_unreadable += chunk.num_unreadable
        num_images = max(self.num_seen, _FIRST_IMAGES) if self.num_images is None else self.num_images
        allowed = int(self.config.data.max_unreadable_share * num_images)
        if self.num_unreadable > allowed:
            raise InputError(
                f"{self.num_unreadable} of {num_images} images cannot be read, {allowed} are allowed; remove them or "
                "raise data.max_unreadable_share."
            )

    def _ask(self, images: Sequence[_Waiting], shape: Sequence[int]) -> None:
        """Show images to the teacher in one batch, filled up with black ones, and add its outputs to their groups."""
        pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.arguments.device.type == "cuda")
        for place, image in enumerate(images):
            pixels[place] = image.pixel_values
        outputs = self._encode(pixels, len(images))
        begin = 0
        for part, same in itertools.groupby(image.part for image in images):  # images of a group follow each other
            end = begin + len(list(same))
            part.outputs.append({name: tensor[begin:end] for name, tensor in outputs.items()})
            part.num_waiting -= end - begin
            begin = end

    @torch.no_grad()
    def _encode(self, pixels: Tensor, num_images: int) -> dict[str, Tensor]:
        """Return the teacher's outputs on the first images of a batch [M, K, 3, H, W], [num_images, K, ...] each."""
        images = pixels.flatten(0, 1).to(self.arguments.device, non_blocking=True)
        dtype = torch.bfloat16 if self.arguments.bf16 else torch.float16
        with torch.autocast(images.device.type, dtype=dtype, enabled=self.arguments.bf16 or self.arguments.fp16):
            output = self.task.targets({"pixel_values": images})
        patches, scales = quantise(output.feature_map, min(self.config.store.grid, output.feature_map.shape[-1]))
        self._describe_cost(output, patches, scales)
        tensors = {"embedding": output.embedding.half(), "patches": patches, "scales": scales}
        return {name: tensor.unflatten(0, pixels.shape[:2])[:num_images] for name, tensor in tensors.items()}

    def _describe_cost(self, output: TeacherOutput, patches: Tensor, scales: Tensor) -> None:
        if self.has_described_cost:
            return
        self.has_described_cost = True
        size, grid, width = output.embedding.shape[1], *patches.shape[2:]
        cost = bytes_per_crop(size, width, grid)
        logger.info(
            "A crop takes %d bytes: an embedding of %d numbers and %dx%d patch features of %d (of the teacher's "
            "%dx%d); rounding them to 8 bits changes them by %.2g%%.",
            cost, size, grid, grid, width, *output.feature_map.shape[-2:],
            100 * rounding_error(output.feature_map, patches, scales),
        )  # fmt: skip
        if self.num_images is not None:
            num_crops = self.config.store.crops
            gigabytes = self.num_images * num_crops * cost / 1e9
            logger.info("%d images with %d crops each will take %.3g GB.", self.num_images, num_crops, gigabytes)

    def _write(self, part: _Part, progress: ReinforceProgress) -> None:
        outputs = {name: torch.cat([output[name] for output in part.outputs]).cpu() for name in part.outputs[0]}
        size = self.writer.write_group(
            part.group, part.keys, part.sizes, part.crops, **outputs, num_unreadable=part.num_unreadable
        )
        progress.add_file(size)
