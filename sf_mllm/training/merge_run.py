"""Merging step by step: find the adapter and what it was trained on, join, fold in, write."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from sf_mllm.config import load_run_config
from sf_mllm.encoder.strict_loading import list_some
from sf_mllm.errors import InputError, first_line
from sf_mllm.training.hub import check_repository_name, push_to_hub
from sf_mllm.training.instruct_config import InstructConfig, SaveConfig
from sf_mllm.training.instruct_parts import join, load_decoder, load_encoder
from sf_mllm.training.instruct_results import write_merged_model
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class MergeRequest:
    """What to merge into what; None takes the value of the run that the adapter comes from.

    Attributes:
        source: run folder of stage two, one of its checkpoints, or a directory with an adapter alone.
        output: directory to write; must not exist.
        encoder: as in a run's configuration, as are the fields below.
        decoder: directory or hub id.
        chat_template: a built-in name or a file.
        dtype: of the saved weights.
        max_shard_size: largest weight file.
        remote_code: add the model's own code.
        push_to_hub: "owner/name" to upload the directory to.
    """

    source: str
    output: str
    encoder: str | None = None
    decoder: str | None = None
    chat_template: str | None = None
    dtype: str | None = None
    max_shard_size: str | None = None
    remote_code: bool | None = None
    push_to_hub: str | None = None


def run_merge(request: MergeRequest) -> Path:
    """Merge and write; return the directory.

    Raises:
        InputError: the adapter or what it was trained on cannot be found, they do not belong together, or there is
            something at the output's place.
    """
    output = Path(request.output)
    if output.exists():
        raise InputError(f"'{output}' exists already; give a directory that is yet to be made.")
    if request.push_to_hub is not None:
        check_repository_name(request.push_to_hub)
    adapter, run = find_adapter(Path(request.source))
    config = _configure(request, adapter, run)

    dtype = getattr(torch, config.dtype)
    encoder, image_processor = load_encoder(config.encoder, dtype)
    decoder, tokenizer = load_decoder(config.decoder, dtype)
    base, processor = join(encoder, image_processor, decoder, tokenizer, config.chat_template)
    model = load_adapter(base, adapter)
    write_merged_model(output, model, processor, config.save)
    logger.info("Merged '%s' into '%s'. Chat with it: python -m sf_mllm.cli --model %s", adapter, output, output)
    if request.push_to_hub is not None:
        logger.info("Uploaded to %s", push_to_hub(output, request.push_to_hub))
    return output


def find_adapter(source: Path) -> tuple[Path, RunFolder | None]:
    """Return the directory of an adapter, and the run folder that it lies in, if it lies in one.

    Raises:
        InputError: there is no adapter.
    """
    if not source.is_dir():
        raise InputError(f"Adapter directory '{source}' does not exist; give a run folder of stage two or an adapter.")
    adapter = next((path for path in (source, source / "adapter") if (path / _ADAPTER_CONFIG).is_file()), None)
    if adapter is None:
        checkpoints = sorted(path.parent for path in source.glob(f"checkpoints/checkpoint-*/{_ADAPTER_CONFIG}"))
        hint = f"give a checkpoint of it, such as {checkpoints[-1]}" if checkpoints else "is its run finished?"
        raise InputError(f"'{source}' holds no adapter ({_ADAPTER_CONFIG}); {hint}.")
    resolved = adapter.resolve()
    for folder in (resolved, *resolved.parents[:2]):
        if (folder / "config.yaml").is_file():
            return adapter, RunFolder(folder)
    return adapter, None


def load_adapter(base: SFLlavaForConditionalGeneration, adapter: Path) -> PeftModel:
    """Put a trained adapter on the model it was trained on; `base` is changed in place.

    Raises:
        InputError: the adapter is damaged or does not fit; names the weights.
    """
    base.model.multi_modal_projector.float()  # trained in float32, and PEFT keeps its copy in the dtype it finds
    try:
        model = get_peft_model(base, PeftConfig.from_pretrained(str(adapter)))
        weights = load_peft_weights(str(adapter), device="cpu")
    except Exception as error:  # a broken file makes the readers stumble in many ways
        raise InputError(f"Adapter in '{adapter}' cannot be loaded: {first_line(error)}.") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    misfits = expected.keys() ^ weights.keys() | {
        name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape
    }
    if misfits:
        raise InputError(
            f"Adapter in '{adapter}' was trained on another model: {len(misfits)} weights differ in name or shape "
            f"({list_some(misfits)}); give the encoder and the decoder that it was trained with."
        )
    set_peft_model_state_dict(model, weights)
    return model


def _configure(request: MergeRequest, adapter: Path, run: RunFolder | None) -> InstructConfig:
    """Return the configuration of the adapter's run with the requested changes."""
    parts = {name: getattr(request, name) for name in ("encoder", "decoder", "chat_template")}
    save = {name: getattr(request, name) for name in ("dtype", "max_shard_size", "remote_code")}
    given = {name: value for name, value in parts.items() if value is not None}
    given_save = {name: value for name, value in save.items() if value is not None}
    if run is not None:
        config = load_run_config(InstructConfig, run.config_file)
        return dataclasses.replace(config, **given, save=dataclasses.replace(config.save, **given_save))
    missing = {"encoder", "decoder"} - given.keys()
    if missing:
        raise InputError(
            f"Adapter '{adapter}' lies in no run folder that says what it was trained on; "
            f"give {' and '.join(f'--{name}' for name in sorted(missing))}."
        )
    return InstructConfig(output_dir=request.output, **given, save=SaveConfig(**given_save))
