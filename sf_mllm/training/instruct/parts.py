"""Load what stage two joins: an encoder of ours and a language model of any family."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.strict_loading import refuse_misfit
from sf_mllm.errors import InputError, first_line
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.part_files import (
    find_decoder,
    find_encoder,
    refusal_of_decoder,
    set_chat_template,
)
from sf_mllm.training.instruct.quantization import make_quantization_config
from sf_mllm.vlm.build import build_sf_llava
from sf_mllm.vlm.fingerprints import fingerprint_decoder
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor


def load_parts(config: InstructConfig) -> tuple[SFLlavaForConditionalGeneration, SFLlavaProcessor]:
    """Load encoder and decoder as a run names them and join them; projector and adapters are yet to come.

    A decoder that is to be quantised is loaded whole on the CPU before, because its fingerprint cannot be taken from
    4-bit weights.

    Raises:
        InputError: a part cannot be had.
    """
    dtype = getattr(torch, config.dtype)
    quantization = None if config.quantization is None else make_quantization_config()
    encoder, image_processor = load_encoder(config.encoder, dtype)
    decoder, tokenizer = load_decoder(config.decoder, dtype)
    decoder_fingerprint = fingerprint_decoder(decoder)
    if quantization is not None:
        decoder, tokenizer = load_decoder(config.decoder, dtype, quantization)
    set_seed(config.seed)  # of the projector
    model, processor = join(
        encoder, image_processor, decoder, tokenizer, config.chat_template, decoder_fingerprint=decoder_fingerprint
    )
    model.is_loaded_in_4bit = quantization is not None
    return model, processor


def load_encoder(path: str, dtype: torch.dtype) -> tuple[SparseFormerModel, SparseFormerImageProcessor]:
    """Load an encoder from its directory, from a run folder of either stage, or from a model directory of stage two.

    Raises:
        InputError: there is none, or its files are incomplete or do not fit.
    """
    directory = find_encoder(path)
    try:
        encoder = SparseFormerModel.from_pretrained(directory, dtype=dtype)
        image_processor = SparseFormerImageProcessor.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a broken file makes the readers stumble in many ways
        raise InputError(f"Encoder in '{directory}' cannot be loaded: {first_line(error)}.") from error
    return encoder, image_processor


def load_decoder(
    name_or_path: str, dtype: torch.dtype, quantization: BitsAndBytesConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a directory or from the hub.

    Args:
        name_or_path: directory or hub id.
        dtype: of the weights, or of those that `quantization` leaves alone.
        quantization: how to quantise the linear layers; the decoder is then on this process's device.

    Raises:
        InputError: they cannot be had.
    """
    source = find_decoder(name_or_path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, quantization_config=quantization, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a broken file makes the readers stumble in many ways, and so does the hub
        raise refusal_of_decoder(source, error) from error
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
    *,
    decoder_fingerprint: str | None = None,
) -> tuple[SFLlavaForConditionalGeneration, SFLlavaProcessor]:
    """Build the model around the tokenizer's chat template, or around another one (a built-in name or a file).

    Raises:
        InputError: there is no template, or one that cannot teach where an answer ends.
    """
    stop = set_chat_template(tokenizer, chat_template)
    assert isinstance(tokenizer.chat_template, str)
    return build_sf_llava(
        encoder,
        image_processor,
        decoder,
        tokenizer,
        chat_template=tokenizer.chat_template,
        stop_token=stop,
        decoder_fingerprint=decoder_fingerprint,
    )
