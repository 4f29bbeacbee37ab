"""Write the one directory that holds a finished model: weights, configuration, processor, and code for strangers."""

from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from sf_mllm.remote_code import set_remote_code
from sf_mllm.training.run_folder import write_directory_atomically


def write_model_directory(
    directory: str | Path,
    model: PreTrainedModel,
    processor: ProcessorMixin | BaseImageProcessor,
    *,
    max_shard_size: str = "5GB",
    remote_code: bool = True,
) -> None:
    """Write a model that the Auto classes of transformers load, replacing an earlier directory in one step.

    Args:
        directory: where; its parents are made.
        model: an encoder or an SFLlava, of this package's classes.
        processor: the encoder's image processor or the SFLlava's processor.
        max_shard_size: largest weight file, "5GB" or "500MB".
        remote_code: add the model's own code, so that `trust_remote_code=True` loads it where this package is not
            installed. Where the package is imported and registered, that file is never run.
    """
    with write_directory_atomically(directory) as temporary:
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        processor.save_pretrained(temporary)
        set_remote_code(temporary, include=remote_code)
