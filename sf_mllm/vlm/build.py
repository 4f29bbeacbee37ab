"""Join an encoder and a text-only language model into a new SFLlava, whose projector is yet to be trained."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
from sf_mllm.vlm.fingerprints import (
    Fingerprints,
    fingerprint,
    fingerprint_decoder,
    fingerprint_text,
    fingerprint_vocabulary,
)
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

_ROWS_MULTIPLE_OF = 64
"""A vocabulary that has to grow is padded to this multiple, which matrix kernels are fast at."""


def build_sf_llava(
    encoder: SparseFormerModel,
    image_processor: BaseImageProcessor,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str,
    stop_token: str,
    decoder_fingerprint: str | None = None,
) -> tuple[SFLlavaForConditionalGeneration, SFLlavaProcessor]:
    """Join the parts; their weights are used, not copied, and only the projector is new.

    The tokenizer gets an `<image>` token if it has none. The embedding grows only if it has no unused row for it, so
    padded vocabularies keep their size and tied embeddings stay tied.

    Args:
        encoder: vision tower.
        image_processor: the one the encoder was made with.
        decoder: a causal language model of any family whose base model `AutoModel` knows.
        tokenizer: the decoder's; changed in place.
        chat_template: Jinja template that takes image content (`data.chat.accept_image_content`).
        stop_token: the token with which the template ends an answer; generation stops at it.
        decoder_fingerprint: of a decoder whose weights are quantised, taken before; None: taken here.

    Returns:
        The model, in the parts' dtypes, and its processor.

    Raises:
        InputError: the decoder is no causal language model.
    """
    head = decoder.get_output_embeddings()
    if not isinstance(head, nn.Linear) or decoder.base_model is decoder:
        raise InputError(
            f"The decoder is a {type(decoder).__name__}, not a causal language model with a linear head; "
            "give a text-only model such as Llama, Qwen or Vicuna."
        )
    image_token_id = _add_image_token(decoder, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.chat_template = chat_template

    config = SFLlavaConfig(
        vision_config=_describe(encoder),
        text_config=_describe(decoder),
        image_token_index=image_token_id,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    config.fingerprints = Fingerprints(
        tokens_per_image=config.image_seq_length,
        encoder=fingerprint(encoder),
        decoder=decoder_fingerprint or fingerprint_decoder(decoder),
        vocabulary=fingerprint_vocabulary(tokenizer),
        chat_template=fingerprint_text(chat_template),
    ).to_record()
    with torch.device("meta"):
        model = SFLlavaForConditionalGeneration(config)
    model.model.vision_tower = encoder
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    # PyTorch's own initialisation, as in LLaVA: the projector's input and output are of ordinary scale.
    model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(head.weight.device)

    model.generation_config = copy.deepcopy(decoder.generation_config)
    model.generation_config._from_model_config = False  # so that transformers keeps what is set here
    stops = {tokenizer.convert_tokens_to_ids(stop_token), tokenizer.eos_token_id} - {None}
    model.generation_config.eos_token_id = sorted(stops)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.suppress_tokens = [image_token_id]  # it has no image to stand for in an answer

    processor = SFLlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=config.image_seq_length,
        chat_template=chat_template,
    )
    return model, processor


def cast_weights(model: SFLlavaForConditionalGeneration, dtype: torch.dtype) -> SFLlavaForConditionalGeneration:
    """Cast weights in place, except those that the model keeps in float32 (coordinates), and return the model."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config.dtype = dtype  # type: ignore[union-attr]  # both are configurations by now
    return model


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the token `<image>`, unless it has it."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)


def _describe(part: PreTrainedModel) -> dict[str, Any]:
    """Return a part's configuration as fields, without how and from where it was loaded for this run."""
    fields = part.config.to_dict()
    for means_nothing_elsewhere in ("_name_or_path", "quantization_config"):
        fields.pop(means_nothing_elsewhere, None)
    return fields


def _add_image_token(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    add_image_token(tokenizer)
    old_rows = len(_vocabulary_tables(decoder)[0])
    if len(tokenizer) > old_rows:
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_ROWS_MULTIPLE_OF, mean_resizing=False)
        # The mean of the old rows, without the random draw of transformers: an average logit is never the highest.
        for weight in _vocabulary_tables(decoder):
            weight[old_rows:] = weight[:old_rows].mean(dim=0)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(image_token_id, int)
    return image_token_id


def _vocabulary_tables(decoder: PreTrainedModel) -> list[Tensor]:
    """Return the weights of input and output embedding, detached; the same storage twice if they are tied."""
    tables = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    return [table.weight.detach() for table in tables if isinstance(table, nn.Embedding | nn.Linear)]
