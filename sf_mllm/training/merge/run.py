"""Merging step by step: find what a run trained and the parts it was trained on, join, fold in, write."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from sf_mllm.config import load_run_config
from sf_mllm.errors import InputError
from sf_mllm.training.hub import check_repository_name, push_to_hub
from sf_mllm.training.instruct.config import InstructConfig, SaveConfig
from sf_mllm.training.instruct.parts import load_parts
from sf_mllm.training.instruct.results import write_merged_model
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.vlm.adapters import load_adapters, train_projector_alone
from sf_mllm.vlm.fingerprints import FINGERPRINTS_FILE, Fingerprints, read_fingerprints
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.projector_files import PROJECTOR_FOLDER, load_projector

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_RUN_CONFIG = "config.yaml"


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
    trained, run = find_trained(Path(request.source))
    config = _configure(request, trained, run)
    base, processor = load_parts(config)
    if (trained / _ADAPTER_CONFIG).is_file():
        check_fingerprints(base, trained, run)
        model = load_adapters(base, trained)
    else:
        load_projector(base, trained)
        model = train_projector_alone(base)
    write_merged_model(output, model, processor, config.save)
    logger.info("Merged '%s' into '%s'. Chat with it: python -m sf_mllm.cli --model %s", trained, output, output)
    if request.push_to_hub is not None:
        logger.info("Uploaded to %s", push_to_hub(output, request.push_to_hub))
    return output


def find_trained(source: Path) -> tuple[Path, RunFolder | None]:
    """Return the directory with what was trained, and the run folder that it lies in, if it lies in one.

    That is an adapter, with the projector in it, or the projector of a run without adapters.

    Raises:
        InputError: there is neither.
    """
    if not source.is_dir():
        raise InputError(f"Adapter directory '{source}' does not exist; give a run folder of stage two or an adapter.")
    directories = [path for path in (source, source / "adapter") if (path / _ADAPTER_CONFIG).is_file()]
    if (source / _RUN_CONFIG).is_file() and (source / PROJECTOR_FOLDER).is_dir():
        directories.append(source / PROJECTOR_FOLDER)
    if not directories:
        checkpoints = [path.parent for path in source.glob(f"checkpoints/checkpoint-*/{_ADAPTER_CONFIG}")]
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
        hint = f"give a checkpoint of it, such as {newest}" if newest else "is its run finished?"
        raise InputError(f"'{source}' holds no adapter ({_ADAPTER_CONFIG}); {hint}.")
    resolved = directories[0].resolve()
    for folder in resolved.parents[:2]:
        if (folder / _RUN_CONFIG).is_file():
            return directories[0], RunFolder(folder)
    return directories[0], None


def check_fingerprints(base: SFLlavaForConditionalGeneration, adapter: Path, run: RunFolder | None) -> None:
    """Compare the parts at hand with those that an adapter was trained on.

    Args:
        base: encoder and decoder, joined anew.
        adapter: a run's adapter or one of its checkpoints.
        run: which says what a checkpoint belongs to.

    Raises:
        InputError: they are others, or nothing says what they should be.
    """
    if run is not None and not (adapter / FINGERPRINTS_FILE).is_file():
        recorded = Fingerprints.from_record(run.record.get("fingerprints"))
    else:
        recorded = read_fingerprints(adapter)
    recorded.refuse_other(
        Fingerprints.from_record(base.config.fingerprints),
        owner=f"The adapter in '{adapter}'",
        otherwise="train another adapter on these parts",
    )


def _configure(request: MergeRequest, trained: Path, run: RunFolder | None) -> InstructConfig:
    """Return the configuration of the run with the requested changes and an unquantised decoder."""
    parts = {name: getattr(request, name) for name in ("encoder", "decoder", "chat_template")}
    written = {name: getattr(request, name) for name in ("dtype", "max_shard_size", "remote_code")}
    given = {name: value for name, value in parts.items() if value is not None}
    given_save = {name: value for name, value in written.items() if value is not None}
    if run is not None:
        config = load_run_config(InstructConfig, run.config_file)
        save = dataclasses.replace(config.save, **given_save)
        return dataclasses.replace(config, **given, quantization=None, save=save)
    missing = {"encoder", "decoder"} - given.keys()
    if missing:
        raise InputError(
            f"'{trained}' lies in no run folder that says what it was trained on; "
            f"give {' and '.join(f'--{name}' for name in sorted(missing))}."
        )
    return InstructConfig(output_dir=request.output, **given, save=SaveConfig(**given_save))
