"""A trained projector on its own: written after every run, and the start of the next one.

`projector.safetensors` holds the weights in float32 under the names of transformers' LLaVA projector, and
`fingerprints.json` says which encoder, decoder and tokenizer it translates between.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sf_mllm.errors import InputError, first_line
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
from sf_mllm.vlm.fingerprints import Fingerprints, read_fingerprints, write_fingerprints
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration

PROJECTOR_FOLDER = "projector"
_WEIGHTS = "projector.safetensors"
_MAKE_ONE = "give the folder of an earlier run, or set projector: null to train a new one"


def save_projector(projector: nn.Module, fingerprints: Fingerprints, directory: Path) -> None:
    """Write a projector and the fingerprints of the model that it was trained in into a directory."""
    weights = {name: tensor.to("cpu", torch.float32) for name, tensor in projector.state_dict().items()}
    save_file(weights, directory / _WEIGHTS, metadata={"format": "pt"})
    write_fingerprints(directory, fingerprints)


def load_projector(model: SFLlavaForConditionalGeneration, path: str | Path) -> None:
    """Give a model the projector of an earlier run.

    Args:
        model: of the same encoder, decoder, tokenizer and chat template; changed in place.
        path: as for `find_projector`.

    Raises:
        InputError: there is no projector, it belongs to other parts (says which), or it is damaged.
    """
    directory = find_projector(path)
    read_fingerprints(directory).refuse_other(
        Fingerprints.from_record(model.config.fingerprints),
        owner=f"The projector in '{directory}'",
        otherwise="set projector: null to train a new one",
    )
    try:
        model.model.multi_modal_projector.load_state_dict(load_file(directory / _WEIGHTS))
    except Exception as error:  # a broken file makes the readers stumble in many ways
        raise InputError(f"The projector in '{directory}' cannot be loaded: {first_line(error)}.") from error


def find_projector(path: str | Path) -> Path:
    """Return the directory of a projector.

    Args:
        path: the directory itself, or the folder of the run that wrote it.

    Raises:
        InputError: there is none; says what there is instead.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"Projector directory '{path}' does not exist; {_MAKE_ONE}.")
    for directory in (path, path / PROJECTOR_FOLDER):
        if (directory / _WEIGHTS).is_file():
            return directory
    if (path / "config.yaml").is_file():
        raise InputError(f"Run folder '{path}' has no projector yet; finish that run first: give its command again.")
    if (path / "config.json").is_file():
        raise InputError(f"'{path}' holds {_describe_model(path)}; {_MAKE_ONE}.")
    raise InputError(f"'{path}' holds no projector ({_WEIGHTS}); {_MAKE_ONE}.")


def _describe_model(path: Path) -> str:
    """Say why a directory with a whole model in it is no projector to go on with."""
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind, tokens = fields.get("model_type"), fields.get("image_seq_length")
    except (ValueError, AttributeError):
        return "a damaged config.json and no projector"
    if kind == SFLlavaConfig.model_type:
        return "a whole model; its projector lies in the run folder above it"
    many = f" of {tokens} tokens an image" if tokens else ""
    return f"a '{kind}' model{many}, whose projector reads another kind of vision encoder"
