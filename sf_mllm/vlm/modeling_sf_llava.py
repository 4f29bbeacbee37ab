"""SparseFormer encoder + projector + language model: a thin subclass of transformers' LLaVA.

Merging of visual tokens, loss and generation are transformers'. Ours are the tower and what it needs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import (
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from typing_extensions import Self

from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel, SparseFormerOutput
from sf_mllm.encoder.strict_loading import StrictLoadingMixin
from sf_mllm.vlm.configuration_sf_llava import SFLlavaConfig
from sf_mllm.vlm.fingerprints import Fingerprints, fingerprint, fingerprint_decoder


class SFLlavaModel(LlavaModel):
    """The multimodal model without its language head."""

    config: SFLlavaConfig
    always_encodes: bool = False
    """Whether a batch without images runs tower and projector in evaluation, too; for weights that processes share."""

    def __init__(self, config: SFLlavaConfig) -> None:
        # LlavaModel's constructor would look the tower up in AutoModel, where another copy of the class may be
        # registered; the tower is built from our own class instead.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = SparseFormerModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> SparseFormerOutput:
        """Encode and project images.

        Args:
            pixel_values: [I, 3, H, W], normalised; any floating dtype.
            **kwargs: LLaVA's choices of layer and tokens, which the configuration fixes here.

        Returns:
            The tower's output (with `rois`), where `pooler_output` is now a list of I tensors
            [image_seq_length, E], which is where transformers looks for features.
        """
        # A frozen tower needs no graph, even where activation checkpointing asks its inputs to carry gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_tower_frozen()):
            output: Any = self.vision_tower(pixel_values.to(self.vision_tower.dtype))
        tokens = output.last_hidden_state.to(self.multi_modal_projector.linear_1.weight.dtype)
        output.pooler_output = list(self.multi_modal_projector(tokens))
        return output

    def get_placeholder_mask(self, input_ids: Any, inputs_embeds: Any, image_features: Any) -> Tensor:
        """Return LLaVA's mask of positions that take visual tokens, after checking their number.

        Args:
            input_ids: [B, T], or None where only embeddings are given.
            inputs_embeds: [B, T, E].
            image_features: [I * image_seq_length, E].

        Returns:
            [B, T, 1], bool.

        Raises:
            ValueError: the text holds another number of image tokens than the images give.
        """
        if input_ids is None:  # which LLaVA takes, but for its annotation
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)  # type: ignore[arg-type]
        mask: Tensor = input_ids == self.config.image_token_id
        if not torch.compiler.is_compiling():
            placeholders = int(mask.sum())  # waits for the device, once
            features, per_image = len(image_features), self.vision_tower.config.num_tokens
            if placeholders != features:
                raise ValueError(
                    f"{features // per_image} images give {features} features but the text holds {placeholders} image "
                    f"tokens; one image needs {per_image}, check the processor's tokens per image."
                )
        return mask[..., None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Run LLaVA's forward; a training batch without images still touches every trained parameter.

        Distributed training waits for the gradients of the projector on every rank: a rank whose batch is text only
        would leave the others waiting for ever. One blank image, multiplied by zero, gives it gradients of zero.
        Where each rank holds a part of every weight (ZeRO-3, FSDP) the same holds for gathering them, in training and
        in evaluation.
        """
        # transformers calls it `cache` from 5.24 on.
        continues = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
        if (self.training or self.always_encodes) and pixel_values is None and not continues:
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
                input_ids = None
            blank = inputs_embeds.new_zeros(1, 3, 32, 32)
            features: Any = self.get_image_features(blank).pooler_output
            inputs_embeds = inputs_embeds + 0.0 * torch.cat(features).sum().to(inputs_embeds.dtype)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen tower stays in evaluation mode, without stochastic depth."""
        super().train(mode)
        if self._is_tower_frozen():
            self.vision_tower.eval()
        return self

    def _is_tower_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.vision_tower.parameters())


class SFLlavaForConditionalGeneration(StrictLoadingMixin, LlavaForConditionalGeneration):
    """Answers in text to images and text.

    Example:
        >>> register_auto_classes()
        >>> model = AutoModelForImageTextToText.from_pretrained(directory)
        >>> processor = AutoProcessor.from_pretrained(directory)
        >>> turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
        >>> prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
        >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    """

    config: SFLlavaConfig
    is_loaded_in_4bit: bool = False
    """Whether bitsandbytes quantised the language model; PEFT looks for it on the whole model."""

    def __init__(self, config: SFLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = SFLlavaModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but only weights that are complete and that belong to the configuration.

        Encoder and decoder are compared with the fingerprints in `config.json`. Weights that are quantised, offloaded
        or changed by an adapter while they are loaded cannot be compared.

        Raises:
            InputError: keys are missing, left over or of another shape, or the weights are another encoder's or
                decoder's.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not getattr(model, "_hf_peft_config_loaded", False):
            Fingerprints.from_record(model.config.fingerprints).refuse_other(
                model._fingerprint_weights(),
                owner=f"The configuration in '{pretrained_model_name_or_path}'",
                otherwise="copy config.json and the weights again, together",
            )
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the fingerprints of the weights that are saved."""
        if self.config.fingerprints is not None:
            weights = self._fingerprint_weights()
            self.config.fingerprints |= {"encoder": weights.encoder, "decoder": weights.decoder}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _fingerprint_weights(self) -> Fingerprints:
        return Fingerprints(
            tokens_per_image=self.model.vision_tower.config.num_tokens,
            encoder=fingerprint(self.model.vision_tower),
            decoder=fingerprint_decoder(self.model.language_model),
        )
