"""The conversations of an instruct run: read, checked, and split into training and held-out ones."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.data.messages import Conversation, read_llava_json
from sf_mllm.errors import InputError
from sf_mllm.training.instruct_config import InstructConfig
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

logger = logging.getLogger(__name__)

_MAX_PROCESSES = 16  # each takes about a GiB of memory, and a container may see more cores than it may use
_SCENES_PER_PROCESS = 2000  # fewer are drawn sooner than another process starts


def prepare_data(
    config: InstructConfig, run: RunFolder, processor: SFLlavaProcessor
) -> tuple[ConversationDataset, ConversationDataset, dict[str, int]]:
    """Read and check all conversations and split off the held-out ones at the end.

    Returns:
        Training data, held-out data, and the counts of both together.

    Raises:
        InputError: the file cannot be used, changed since the run began, or holds rows that teach nothing.
    """
    file, image_root = config.data.conversations, config.data.image_root
    if file == "scenes":
        file, image_root = draw_scenes(run.path / "scenes", config)
    conversations = read_llava_json(file, image_root)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    earlier = run.record.get("data")
    if earlier and earlier["sha256"] != digest:
        raise InputError(f"'{file}' changed since this run began; restore it or start a new run in another output_dir.")
    num_training = len(conversations) - config.data.held_out
    if num_training < 1:
        raise InputError(
            f"'{file}' holds {len(conversations)} conversations and data.held_out={config.data.held_out} of them are "
            "kept out of training, so none is left; lower data.held_out or add rows."
        )

    def dataset(rows: Sequence[Conversation]) -> ConversationDataset:
        return ConversationDataset(
            rows,
            processor.tokenizer,
            processor.image_processor,
            image_seq_length=processor.image_seq_length,
            max_length=config.data.max_length,
        )

    counts = dataset(conversations).check(workers=int(config.train.get("dataloader_num_workers", 0)))
    run.update_record(data={"conversations": file, "sha256": digest, "held_out": config.data.held_out, **counts})
    return dataset(conversations[:num_training]), dataset(conversations[num_training:]), counts


def draw_scenes(folder: Path, config: InstructConfig) -> tuple[str, str]:
    """Export the built-in scenes, unless they are there; return their JSON file and image folder."""
    from sf_mllm.data import scenes  # only runs on scenes need the renderer

    logger.info("Drawing %d scenes in %s", config.data.scenes_count, folder)
    count = config.data.scenes_count
    workers = min(os.cpu_count() or 1, _MAX_PROCESSES, 1 + count // _SCENES_PER_PROCESS)
    scenes.export_scenes(folder, count=count, seed=config.seed, workers=workers)
    return str(folder / scenes.CONVERSATIONS_FILE), str(folder / scenes.IMAGE_FOLDER)
