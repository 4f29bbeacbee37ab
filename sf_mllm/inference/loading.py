"""From a path or hub id to a model that answers and its processor; a directory that cannot work is explained."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from sf_mllm.assets import resolve_demo
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.strict_loading import refuse_misfit
from sf_mllm.errors import InputError, first_line, nearest
from sf_mllm.registration import register_auto_classes
from sf_mllm.vlm.fingerprints import Fingerprints, fingerprint_text, fingerprint_vocabulary

DEVICE_TYPES = ("cuda", "mps", "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MAKE_ONE = "give a directory written by scripts/finetune_llava.sh"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_model(
    path: str | os.PathLike[str], device: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model that answers questions about images, in eval mode, with its processor.

    What the model is comes from its `config.json` alone. Loading is strict: weights that are missing, left over or of
    another shape are an error. Code that lies beside the weights is never run, nor is the user asked whether it may.

    Args:
        path: model directory, run folder of stage two, "demo:sf_llava", or id of a repository on the hub.
        device: "cuda", "cuda:1", "mps", "cpu"; None takes the first that is there.
        dtype: one of `DTYPES`; None takes bfloat16 on cuda, else float32.

    Raises:
        InputError: the model cannot be found or is incomplete, damaged or no image-text model; or there is no such
            device or type.
    """
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    register_auto_classes()
    directory = _locate(resolve_demo(os.fspath(path)))
    _check_config(directory)
    _check_files(directory)

    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=torch_dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, with the other differences
            output_loading_info=True,
        )
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"Weights in '{directory}' are damaged: {first_line(error)}; copy them again.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"Model in '{directory}' cannot be loaded: {first_line(error)}.") from error
    model, report = loaded
    refuse_misfit(type(model).__name__, directory, report)
    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file makes transformers' readers stumble in many ways
        raise InputError(
            f"Tokenizer or image settings in '{directory}' cannot be loaded: {first_line(error)}."
        ) from error
    if not processor.chat_template:
        raise InputError(f"Model directory '{directory}' has no chat template (chat_template.jinja); copy it again.")
    _check_tokenizer(model.config, processor, directory)
    return model.to(torch_device).eval(), processor


def choose_device(name: str | None) -> torch.device:
    """Return the named device, or the best one there is.

    Raises:
        InputError: no such device on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind in DEVICE_TYPES if available[kind]]
    if name is None:
        return torch.device(usable[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"Device '{name}' is unknown.{nearest(name, usable)} Usable here: {', '.join(usable)}."
        ) from error
    if device.type not in usable:
        raise InputError(f"Device '{name}' is not available. Usable here: {', '.join(usable)}.")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise InputError(f"Device '{name}' does not exist: this machine has {count} of type {device.type}, from 0 on.")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the named floating-point type, or the one that suits the device.

    Raises:
        InputError: no such type.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"Type '{name}' is unknown.{nearest(name, DTYPES)} Types: {', '.join(DTYPES)}.")
    return DTYPES[name]


def _locate(path: str) -> Path:
    """Return a local directory for a path, a run folder or a hub id."""
    directory = Path(path).expanduser()
    if path and directory.is_dir():
        in_run_folder = directory / "model"
        is_run_folder = not (directory / "config.json").exists() and (in_run_folder / "config.json").exists()
        return in_run_folder if is_run_folder else directory
    if directory.is_file():
        raise InputError(f"Model '{path}' is a file; {_MAKE_ONE}.")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise InputError(f"Model directory '{path}' does not exist; {_MAKE_ONE}, or a hub id of the form owner/name.")

    try:
        return Path(snapshot_download(path, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError) as error:
        raise InputError(
            f"Model '{path}' is neither a directory here nor can it be fetched from the hub: {first_line(error)}."
        ) from error


def _check_config(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise InputError(
                f"'{directory}' holds a LoRA adapter without its model; "
                "give the directory named model that stage two writes beside it, or one that "
                "python -m sf_mllm.training.merge makes of it."
            )
        if (directory / "config.yaml").is_file():
            raise InputError(f"'{directory}' is a run folder without a finished model that can answer; {_MAKE_ONE}.")
        raise InputError(f"Model directory '{directory}' has no config.json; {_MAKE_ONE}.")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # strict configuration classes raise types of their own
        raise InputError(f"'{directory}/config.json' cannot be used: {first_line(error)}.") from error
    if config.model_type == SparseFormerConfig.model_type:
        raise InputError(f"'{directory}' is a vision encoder and cannot answer; {_MAKE_ONE} from it.")
    if not hasattr(config, "vision_config"):
        raise InputError(f"'{directory}' holds a '{config.model_type}' model, which does not read images; {_MAKE_ONE}.")


def _check_tokenizer(config: Any, processor: Any, directory: Path) -> None:
    """Refuse a tokenizer, template or number of visual tokens that the model was not trained with, where it says so."""
    record = getattr(config, "fingerprints", None)
    if record is not None:
        here = Fingerprints(
            tokens_per_image=processor.image_seq_length,
            vocabulary=fingerprint_vocabulary(processor.tokenizer),
            chat_template=fingerprint_text(processor.chat_template),
        )
        Fingerprints.from_record(record).refuse_other(
            here, owner=f"The model in '{directory}'", otherwise="copy the whole directory again"
        )


def _check_files(directory: Path) -> None:
    index = directory / _WEIGHTS_INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"'{index}' is damaged and does not list the weight files; copy it again.") from error
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise InputError(
                f"Model directory '{directory}' lacks {len(missing)} of {len(shards)} weight files: "
                f"{', '.join(missing)}; copy them again."
            )
    elif not (directory / _WEIGHTS).is_file():
        raise InputError(f"Model directory '{directory}' has no weights ({_WEIGHTS} or {_WEIGHTS_INDEX}).")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"Model directory '{directory}' has no tokenizer (one of {', '.join(_TOKENIZER_FILES)}).")
    processors = ("processor_config.json", "preprocessor_config.json")
    if not any((directory / name).is_file() for name in processors):
        raise InputError(f"Model directory '{directory}' has no image settings (one of {', '.join(processors)}).")
