"""What stage two joins, found by the names that a run gives, and what is known of it before any weights are read."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sf_mllm.assets import resolve_demo
from sf_mllm.data.chat import accept_image_content, stop_token
from sf_mllm.data.chat_templates import load_chat_template
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.errors import InputError, first_line
from sf_mllm.vlm.build import add_image_token
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig


def find_encoder(path: str) -> Path:
    """Return the directory with an encoder: itself, or inside a run folder of either stage.

    Raises:
        InputError: there is none, or it holds another kind of model.
    """
    directory = Path(resolve_demo(path))
    if not directory.is_dir():
        raise InputError(
            f"Encoder directory '{directory}' does not exist; give one written by scripts/bootstrap_clip.sh."
        )
    for candidate in (directory, directory / "encoder", directory / "model"):
        if (candidate / "config.json").is_file():
            directory = candidate
            break
    else:
        raise InputError(f"Encoder directory '{directory}' has no config.json; is its run finished?")
    try:
        kind = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:  # no JSON, or no mapping
        raise InputError(f"Encoder in '{directory}' cannot be loaded: {first_line(error)}.") from error
    if kind not in (SparseFormerConfig.model_type, SFLlavaConfig.model_type):
        raise InputError(
            f"Encoder directory '{directory}' holds a '{kind}' model, which is no SparseFormer; "
            "give one written by scripts/bootstrap_clip.sh."
        )
    return directory


def count_tokens_of_image(encoder: str) -> int:
    """Return the visual tokens that an image becomes; reads the encoder's configuration only.

    Raises:
        InputError: there is no such encoder, or its configuration is damaged.
    """
    directory = find_encoder(encoder)
    try:
        config = SparseFormerConfig.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a broken file makes the reader stumble in many ways
        raise InputError(f"Encoder in '{directory}' cannot be loaded: {first_line(error)}.") from error
    return config.num_tokens


def find_decoder(name_or_path: str) -> str:
    """Return the directory or hub id of a decoder.

    Raises:
        InputError: it is a path where no directory is, or a directory whose model reads images already.
    """
    source = resolve_demo(name_or_path)
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise InputError(
            f"Decoder directory '{source}' does not exist; give a directory or a hub id such as owner/name."
        )
    config_file = Path(source) / "config.json"
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"Decoder '{source}' cannot be loaded: {first_line(error)}.") from error
        if "vision_config" in config:
            raise InputError(
                f"Decoder directory '{source}' holds a '{config.get('model_type')}' model, which reads images already; "
                "give the text-only language model that is to learn it."
            )
    return source


def load_tokenizer(decoder: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a decoder's tokenizer as training would use it, with `<image>` and a template that takes images.

    Args:
        decoder: directory or hub id.
        chat_template: as for `set_chat_template`.

    Raises:
        InputError: it cannot be had, or has no template that can teach where an answer ends.
    """
    source = find_decoder(decoder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a broken file makes the readers stumble in many ways, and so does the hub
        raise refusal_of_decoder(source, error) from error
    set_chat_template(tokenizer, chat_template)
    add_image_token(tokenizer)
    return tokenizer


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """Let a tokenizer's template, or another one, take images; return the token that ends an answer.

    Args:
        tokenizer: changed in place.
        chat_template: a built-in name or a Jinja file to take instead of the tokenizer's own template.

    Raises:
        InputError: there is no template, or one that cannot teach where an answer ends.
    """
    if chat_template is not None:
        tokenizer.chat_template = load_chat_template(chat_template)
    stop = stop_token(tokenizer)
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = accept_image_content(tokenizer.chat_template)
    return stop


def refusal_of_decoder(source: str, error: Exception) -> InputError:
    """Say in a sentence why transformers could not load a decoder or its tokenizer."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"Decoder '{source}' brings code of its own, which is never run; give one whose architecture is part of "
            "transformers."
        )
    return InputError(f"Decoder '{source}' cannot be loaded: {first_line(error)}.")
