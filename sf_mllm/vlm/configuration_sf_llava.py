"""Configuration of a SparseFormer encoder joined to a language model."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.errors import InputError


@strict
class SFLlavaConfig(LlavaConfig):
    """LLaVA's configuration with a SparseFormer as vision tower; describes weights, holds no run settings.

    Attributes:
        image_seq_length: visual tokens an image takes in the prompt; None takes the tower's number.
        vision_feature_layer: -1 only: the tokens after the tower's final norm.
        vision_feature_select_strategy: "full" only: the class token is one of the visual tokens.
        fingerprints: of the encoder and the decoder in this model and of the tokenizer it was trained with
            (`vlm.fingerprints.Fingerprints`); None where nobody recorded them.
    """

    model_type = "sf_llava"

    image_seq_length: int | None = None  # type: ignore[assignment]  # filled in below
    vision_feature_select_strategy: Literal["default", "full"] = "full"
    vision_feature_layer: int | list[int] = -1
    fingerprints: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Built here, so that the tower's class does not depend on what is registered with the Auto classes.
        if self.vision_config is None:
            self.vision_config = SparseFormerConfig()
        elif isinstance(self.vision_config, dict):
            kind = self.vision_config.get("model_type", SparseFormerConfig.model_type)
            if kind != SparseFormerConfig.model_type:
                many = f", which gives {self.image_seq_length} tokens an image" if self.image_seq_length else ""
                raise InputError(
                    f"vision_config must describe a SparseFormer, got a '{kind}'{many}; load such a checkpoint with "
                    "the class that its own model_type names, or train a projector for a SparseFormer."
                )
            self.vision_config = SparseFormerConfig(**self.vision_config)
        if self.image_seq_length is None:
            self.image_seq_length = self.vision_config.num_tokens
        super().__post_init__(**kwargs)
        self._refuse_what_the_model_cannot_do()

    def _refuse_what_the_model_cannot_do(self) -> None:
        # Not a `validate_...` method: transformers would wrap the InputError in an exception of its own.
        tower = self.vision_config
        if not isinstance(tower, SparseFormerConfig):
            raise InputError(f"vision_config must describe a SparseFormer, got a {type(tower).__name__}.")
        if self.image_seq_length != tower.num_tokens:
            raise InputError(
                f"image_seq_length is {self.image_seq_length} but the vision tower makes {tower.num_tokens} tokens an "
                "image; leave it out of the configuration, or use the tower that these weights were trained with."
            )
        if self.vision_feature_layer != -1 or self.vision_feature_select_strategy != "full":
            raise InputError(
                f"vision_feature_layer={self.vision_feature_layer!r} with vision_feature_select_strategy="
                f"'{self.vision_feature_select_strategy}' is not supported; the model reads all tokens after the final "
                "norm (-1, 'full')."
            )
