"""Settings of an instruct run; imports nothing heavy."""

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sf_mllm.constants import MAX_SEED
from sf_mllm.errors import InputError, nearest
from sf_mllm.training.instruct.sources import parse_sources

TRAINING_DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("4bit",)
SAVED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DataConfig:
    """Conversations about images."""

    conversations: Any = MISSING
    """A JSON or JSONL file, a Hugging Face data set, "scenes" (the built-in drawings with questions and answers), or a
    list of these, each as a mapping where it has an image_root, weight or licence of its own (`SourceSettings`)."""
    image_root: str | None = None
    """Folder that image paths are relative to; null: the folder of the file that names them."""
    drop_unusable: bool = False
    """Leave out rows that cannot be used (malformed, an image missing or damaged, no answer within max_length) and list
    them in dropped.jsonl, instead of refusing the data. Each image is decoded once before the first step."""
    scenes_count: int = 2000
    """Number of built-in scenes to draw, held-out ones included."""
    max_length: int = 2048
    """Tokens of a conversation, visual ones included; a longer one loses its end."""
    held_out: int | None = None
    """Conversations kept out of training, for a loss and a few answers at the end; drawn from all sources by the seed,
    from each as often as training sees it; null: 16, or a tenth of fewer than 160."""
    seed: int = 0
    """Which rows are held out, which a weight leaves out, and the built-in scenes."""


@dataclass
class LoraSettings:
    """Low-rank adapters on every linear layer of the language model."""

    rank: int = 128
    """Rank of the update."""
    alpha: int = 256
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout before the update, in training."""

    def __post_init__(self) -> None:
        """Check the values."""
        for key, number, is_valid, bounds in (
            ("lora.rank", self.rank, self.rank >= 1, "at least 1"),
            ("lora.alpha", self.alpha, self.alpha >= 1, "at least 1"),
            ("lora.dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1"),
        ):
            if not is_valid:
                raise InputError(f"{key} must be {bounds}, got {number}.")


@dataclass
class SaveConfig:
    """How the finished model is written."""

    dtype: str = "bfloat16"
    """float32, bfloat16 or float16; coordinates stay float32."""
    max_shard_size: str = "5GB"
    """Largest weight file."""
    remote_code: bool = True
    """Put the model's own code beside the weights, for people who load it without this package."""
    push_to_hub: str | None = None
    """owner/name of a hub repository to upload the model to at the end; one that does not exist yet is made, private.
    """


@dataclass
class InstructConfig:
    """A run of stage two.

    LLaVA's two phases are two runs: an align run (`lora: null`) trains the projector alone on captions, an instruct run
    goes on with that projector (`projector: RUN`) and trains it with LoRA adapters on conversations.
    """

    output_dir: str = MISSING
    """Run folder. Any run leaves a whole model in "model" and its projector in "projector"; with LoRA, adapters and
    projector are in "adapter", too."""
    encoder: str = MISSING
    """Encoder directory or run folder of stage one, or a model directory of this stage (its encoder is taken)."""
    decoder: str = MISSING
    """Directory or hub id of any causal language model with a fast tokenizer."""
    projector: str | None = None
    """Run folder of an earlier run with the same parts, whose projector this one starts from; null: random weights."""
    chat_template: str | None = None
    """Name of a built-in template ("vicuna") or a Jinja file; null: the tokenizer's own."""
    dtype: str = "float32"
    """float32 or bfloat16, of the frozen weights; what trains is float32."""
    quantization: str | None = None
    """4bit: hold the frozen decoder in 4 bits (QLoRA, needs bitsandbytes); encoder and projector stay as they are. At
    the end the adapters are merged into the decoder as it is on disk, not into the 4-bit weights."""
    projector_learning_rate: float | None = None
    """Peak rate of the projector if it is to differ from train.learning_rate, which the adapters use."""
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """null: the projector trains alone, at train.learning_rate."""
    data: DataConfig = field(default_factory=DataConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    seed: int = 0
    """Initial weights, order of the conversations and dropout."""
    train: dict[str, Any] = field(default_factory=dict)
    """Any fields of transformers.TrainingArguments."""

    def __post_init__(self) -> None:
        """Check values that do not depend on the models or on the data."""
        parse_sources(self.data.conversations, self.data.image_root)
        for name, value, allowed in (
            ("dtype", self.dtype, TRAINING_DTYPES),
            ("quantization", self.quantization, (None, *QUANTIZATIONS)),
            ("save.dtype", self.save.dtype, SAVED_DTYPES),
        ):
            if value not in allowed:
                names = ["null" if choice is None else choice for choice in allowed]
                raise InputError(
                    f"{name} '{value}' is unknown.{nearest(str(value), names)} Allowed: {', '.join(names)}."
                )
        if self.lora is None and self.projector_learning_rate is not None:
            raise InputError(
                f"projector_learning_rate={self.projector_learning_rate} has no meaning with lora: null, where the "
                "projector is all that trains; set train.learning_rate instead."
            )
        rate = 0.0 if self.projector_learning_rate is None else self.projector_learning_rate
        held_out = self.data.held_out
        for key, number, is_valid, bounds in (
            ("data.max_length", self.data.max_length, self.data.max_length >= 2, "at least 2"),
            ("data.scenes_count", self.data.scenes_count, self.data.scenes_count >= 1, "at least 1"),
            ("data.held_out", held_out, held_out is None or held_out >= 1, "at least 1"),
            ("projector_learning_rate", rate, rate >= 0, "at least 0"),
            ("data.seed", self.data.seed, 0 <= self.data.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
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
