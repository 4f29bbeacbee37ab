"""Load what stage two joins: an encoder of ours and a language model of any family."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sf_mllm.assets import resolve_demo
from sf_mllm.data.chat import accept_image_content, stop_token
from sf_mllm.data.chat_templates import load_chat_template
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.strict_loading import refuse_misfit
from sf_mllm.errors import InputError, first_line
from sf_mllm.vlm.build import build_sf_llava
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor


def load_encoder(path: str, dtype: torch.dtype) -> tuple[SparseFormerModel, SparseFormerImageProcessor]:
    """Load an encoder from its directory, from a run folder of either stage, or from a model directory of stage two.

    Raises:
        InputError: there is none, or its files are incomplete or do not fit.
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
        if kind not in (SparseFormerConfig.model_type, SFLlavaConfig.model_type):
            raise InputError(
                f"Encoder directory '{directory}' holds a '{kind}' model, which is no SparseFormer; "
                "give one written by scripts/bootstrap_clip.sh."
            )
        encoder = SparseFormerModel.from_pretrained(directory, dtype=dtype)
        image_processor = SparseFormerImageProcessor.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a broken file makes the readers stumble in many ways
        raise InputError(f"Encoder in '{directory}' cannot be loaded: {first_line(error)}.") from error
    return encoder, image_processor


def load_decoder(name_or_path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a directory or from the hub.

    Raises:
        InputError: they cannot be had.
    """
    source = resolve_demo(name_or_path)
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise InputError(
            f"Decoder directory '{source}' does not exist; give a directory or a hub id such as owner/name."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a broken file makes the readers stumble in many ways, and so does the hub
        raise InputError(f"Decoder '{source}' cannot be loaded: {first_line(error)}.") from error
    decoder, report = loaded
    # Published checkpoints often hold left-over buffers, which do no harm; what is missing would be random.
    refuse_misfit(type(decoder).__name__, source, {**report, "unexpected_keys": ()})
    return decoder, tokenizer


def join(
    encoder: SparseFormerModel,
    image_processor: SparseFormerImageProcessor,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> tuple[SFLlavaForConditionalGeneration, SFLlavaProcessor]:
    """Build the model around the tokenizer's chat template, or around another one (a built-in name or a file).

    Raises:
        InputError: there is no template, or one that cannot teach where an answer ends.
    """
    if chat_template is not None:
        tokenizer.chat_template = load_chat_template(chat_template)
    stop = stop_token(tokenizer)
    assert isinstance(tokenizer.chat_template, str)
    return build_sf_llava(
        encoder,
        image_processor,
        decoder,
        tokenizer,
        chat_template=accept_image_content(tokenizer.chat_template),
        stop_token=stop,
    )
