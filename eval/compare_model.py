"""The one model of `eval.compare_encoders`: transformers' own LLaVA around any visual tokens."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.data.chat import stop_token
from sf_mllm.errors import InputError


class AnyTower(nn.Module):
    """Gives transformers' LLaVA the tokens of any encoder.

    Args:
        tower: normalised pixels [I, 3, H, W] to tokens [I, N, D]; None where only tokens made before are used.
    """

    def __init__(self, tower: nn.Module | None) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode pixels [I, 3, H, W], or take tokens [I, N, D] that this very encoder made of them before."""
        tokens = pixel_values
        if pixel_values.dim() == 4:
            assert self.tower is not None
            tokens = self.tower(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


class Connector(nn.Module):
    """What trains between encoder and language model: fewer tokens if a peer makes them, then LLaVA's projector."""

    def __init__(self, reduce: nn.Module, project: LlavaMultiModalProjector) -> None:
        super().__init__()
        self.reduce = reduce
        self.project = project

    def forward(self, tokens: Tensor) -> Tensor:
        """[I, N, D] -> [I, M, E]."""
        return self.project(self.reduce(tokens.to(self.project.linear_1.weight.dtype)))


def join_llava(
    tower: nn.Module | None, reduce: Any, decoder: Any, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    """Put the parts into transformers' LLaVA; only the connector's projector is new, random by PyTorch's rules.

    Merging of visual tokens, loss and generation are transformers'. `vision_config` describes nothing but the width.

    Args:
        tower: as for `AnyTower`.
        reduce: a peer.
        decoder: causal language model; its weights are used, not copied.
        tokenizer: the decoder's, with an `<image>` token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id in (None, tokenizer.unk_token_id):
        raise InputError(
            f"The tokenizer '{tokenizer.name_or_path}' has no token {IMAGE_TOKEN}; "
            "compare encoders with a decoder that has one, such as demo:decoder."
        )
    assert isinstance(image_token_id, int)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=reduce.out_width, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1
        ),
        text_config=decoder.config.to_dict(),
        image_token_index=image_token_id,
        image_seq_length=reduce.num_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    parts: Any = model.model
    parts.vision_tower = AnyTower(tower).requires_grad_(False)
    parts.multi_modal_projector = Connector(reduce, LlavaMultiModalProjector(config))
    parts.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    model.generation_config = copy.deepcopy(decoder.generation_config)
    settings: Any = model.generation_config
    settings._from_model_config = False  # so that transformers keeps what is set here
    stops = {tokenizer.convert_tokens_to_ids(stop_token(tokenizer)), tokenizer.eos_token_id} - {None}
    settings.eos_token_id = sorted(stops)
    settings.pad_token_id = tokenizer.pad_token_id
    settings.suppress_tokens = [image_token_id]
    return model
