"""Settings of an instruct run; imports nothing heavy."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sf_mllm.constants import MAX_SEED
from sf_mllm.errors import InputError, nearest

TRAINING_DTYPES = ("float32", "bfloat16")
SAVED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DataConfig:
    """Conversations about images."""

    conversations: str = MISSING
    """A JSON file in LLaVA's format, or "scenes", the built-in drawings with questions and answers."""
    image_root: str | None = None
    """Folder that the file's image paths are relative to; null: the folder of the file."""
    scenes_count: int = 2000
    """Number of built-in scenes to draw, held-out ones included."""
    max_length: int = 2048
    """Tokens of a conversation, visual ones included; a longer one loses its end."""
    held_out: int = 16
    """Conversations at the end of the file kept out of training, for a loss and a few answers at the end."""


@dataclass
class LoraSettings:
    """Low-rank adapters on every linear layer of the language model."""

    rank: int = 128
    """Rank of the update."""
    alpha: int = 256
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout before the update, in training."""


@dataclass
class SaveConfig:
    """How the finished model is written."""

    dtype: str = "bfloat16"
    """float32, bfloat16 or float16; coordinates stay float32."""
    max_shard_size: str = "5GB"
    """Largest weight file."""
    remote_code: bool = True
    """Put the model's own code beside the weights, for people who load it without this package."""


@dataclass
class InstructConfig:
    """An instruct run."""

    output_dir: str = MISSING
    """Run folder; the model ends up in its subfolder "model", the adapter alone in "adapter"."""
    encoder: str = MISSING
    """Encoder directory or run folder of stage one, or a model directory of this stage (its encoder is taken)."""
    decoder: str = MISSING
    """Directory or hub id of any causal language model with a fast tokenizer."""
    chat_template: str | None = None
    """Name of a built-in template ("vicuna") or a Jinja file; null: the tokenizer's own."""
    dtype: str = "float32"
    """float32 or bfloat16, of the frozen weights; what trains is float32."""
    projector_learning_rate: float = 2e-5
    """Peak rate of the projector; the adapters use train.learning_rate."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    seed: int = 0
    """Initial weights, order of the conversations and dropout."""
    train: dict[str, Any] = field(default_factory=dict)
    """Any fields of transformers.TrainingArguments."""

    def __post_init__(self) -> None:
        """Check values that do not depend on the models or on the data."""
        for name, value, allowed in (
            ("dtype", self.dtype, TRAINING_DTYPES),
            ("save.dtype", self.save.dtype, SAVED_DTYPES),
        ):
            if value not in allowed:
                raise InputError(
                    f"{name} '{value}' is unknown.{nearest(value, allowed)} Allowed: {', '.join(allowed)}."
                )
        for key, number, is_valid, bounds in (
            ("lora.rank", self.lora.rank, self.lora.rank >= 1, "at least 1"),
            ("lora.alpha", self.lora.alpha, self.lora.alpha >= 1, "at least 1"),
            ("lora.dropout", self.lora.dropout, 0 <= self.lora.dropout < 1, "at least 0 and below 1"),
            ("data.max_length", self.data.max_length, self.data.max_length >= 2, "at least 2"),
            ("data.scenes_count", self.data.scenes_count, self.data.scenes_count >= 1, "at least 1"),
            ("data.held_out", self.data.held_out, self.data.held_out >= 1, "at least 1"),
            ("projector_learning_rate", self.projector_learning_rate, self.projector_learning_rate >= 0, "at least 0"),
            ("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
        ):
            if not is_valid:
                raise InputError(f"{key} must be {bounds}, got {number}.")
        # Checked here and not where it is used, which is after the training.
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", self.save.max_shard_size, re.IGNORECASE):
            raise InputError(
                f"save.max_shard_size '{self.save.max_shard_size}' is no size; give a number and a unit, such as "
                "5GB or 500MB."
            )
