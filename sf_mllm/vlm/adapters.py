"""Which weights of an SFLlava train: the projector whole, low-rank adapters in the language model, nothing else."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from sf_mllm.encoder.strict_loading import list_some
from sf_mllm.errors import InputError, first_line
from sf_mllm.vlm.fingerprints import Fingerprints, write_fingerprints
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration

# Anchored at the language model: plain suffixes would hit layers of the vision tower too. The names cover the Llama,
# Qwen, Mistral, Gemma and SmolLM families, and Phi's fused layers.
LORA_TARGETS = (
    r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv_proj|gate_up_proj)"
)
PROJECTOR = "multi_modal_projector"


def add_adapters(model: SFLlavaForConditionalGeneration, *, rank: int, alpha: int, dropout: float) -> PeftModel:
    """Freeze a model, put LoRA on its language model and let the projector train.

    The trained weights are float32 whatever the dtype of the frozen ones. Call `transformers.set_seed` first: LoRA
    starts from random weights.

    Args:
        model: changed in place.
        rank: of the low-rank update.
        alpha: the update is scaled by alpha / rank.
        dropout: before the update, in training.

    Raises:
        InputError: the language model has no layer of a known name.
    """
    if rank < 1:
        raise InputError(f"The LoRA rank must be at least 1, got {rank}.")
    if not any(re.fullmatch(LORA_TARGETS, name) for name, _ in model.named_modules()):
        raise InputError(
            f"The decoder, a {type(model.model.language_model).__name__}, has no layers of the names that LoRA is put "
            f"on: {LORA_TARGETS}."
        )
    return _wrap(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS))


def train_projector_alone(model: SFLlavaForConditionalGeneration) -> PeftModel:
    """Freeze a model except for its projector, which is float32 from now on.

    The result is PEFT's, as that of `add_adapters`, so that checkpoints hold what trains and not the frozen model.

    Args:
        model: changed in place.
    """
    return _wrap(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES))


def save_adapters(model: PeftModel, directory: Path) -> None:
    """Write adapters and projector with the fingerprints of the model that they belong to into a directory."""
    model.save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    write_fingerprints(directory, fingerprints_of(model))


def load_adapters(model: SFLlavaForConditionalGeneration, directory: Path) -> PeftModel:
    """Put what was trained back on the model it was trained on: adapters and projector, or the projector alone.

    Args:
        model: the same encoder and decoder, joined anew; changed in place.
        directory: as `save_adapters` or the Trainer, for a checkpoint, wrote it.

    Raises:
        InputError: the files are damaged, or not every weight finds its place.
    """
    try:
        config = LoraConfig.from_pretrained(str(directory))
        weights = load_peft_weights(str(directory), device="cpu")
    except Exception as error:  # a broken file makes the readers stumble in many ways
        raise InputError(f"The adapter in '{directory}' cannot be loaded: {first_line(error)}.") from error
    adapted = _wrap(model, config)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    misfits = expected.keys() ^ weights.keys() | {
        name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape
    }
    if misfits:
        raise InputError(
            f"The adapter in '{directory}' is not complete: {len(misfits)} weights are missing, left over or of "
            f"another shape ({list_some(misfits)}); copy the whole directory again."
        )
    set_peft_model_state_dict(adapted, weights)
    return adapted


def has_adapters(model: PeftModel) -> bool:
    """Whether the language model has adapters, or the projector trains alone."""
    return model.active_peft_config.target_modules != DUMMY_TARGET_MODULES


def trained_projector(model: PeftModel) -> nn.Module:
    """Return the projector that trains; PEFT keeps the untrained one beside it."""
    base: Any = model.get_base_model()
    return base.model.multi_modal_projector.modules_to_save[model.active_adapter]


def fingerprints_of(model: PeftModel) -> Fingerprints:
    """Return the fingerprints of the parts that a model was joined from."""
    base: Any = model.get_base_model()
    return Fingerprints.from_record(base.config.fingerprints)


def trained_parameter_groups(
    model: nn.Module, *, learning_rate: float, projector_learning_rate: float, weight_decay: float
) -> list[dict]:
    """Return optimizer groups: projector and LoRA with a rate each, weight decay on matrices only."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def group(parameters: Iterable[nn.Parameter], rate: float, decay: float) -> dict:
        return {"params": list(parameters), "lr": rate, "weight_decay": decay}

    groups = []
    for is_projector, rate in ((True, projector_learning_rate), (False, learning_rate)):
        members = [parameter for name, parameter in trained if (PROJECTOR in name) == is_projector]
        groups.append(group((p for p in members if p.dim() >= 2), rate, weight_decay))
        groups.append(group((p for p in members if p.dim() < 2), rate, 0.0))
    return [entry for entry in groups if entry["params"]]


def merge_adapters(model: PeftModel) -> SFLlavaForConditionalGeneration:
    """Fold the adapters into the language model and return the plain model; `model` must not be used afterwards."""
    with torch.no_grad():
        merged = model.merge_and_unload()
    assert isinstance(merged, SFLlavaForConditionalGeneration)
    return merged


def _wrap(model: SFLlavaForConditionalGeneration, config: LoraConfig) -> PeftModel:
    model.model.multi_modal_projector.float()  # PEFT keeps its trained copy in the dtype it finds
    config.modules_to_save = [PROJECTOR]
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a deprecated attribute of transformers' models
        return get_peft_model(model, config)
