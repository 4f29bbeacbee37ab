"""What a run of stage two leaves behind: projector, adapter, merged model, and a few answers to look at."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sf_mllm.data.messages import Conversation
from sf_mllm.training.instruct.config import SaveConfig
from sf_mllm.training.model_directory import write_model_directory
from sf_mllm.training.run_folder import write_directory_atomically
from sf_mllm.vlm.adapters import fingerprints_of, has_adapters, merge_adapters, save_adapters, trained_projector
from sf_mllm.vlm.build import cast_weights
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor
from sf_mllm.vlm.projector_files import PROJECTOR_FOLDER, save_projector

logger = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 64


def save_results(
    model: PeftModel, processor: SFLlavaProcessor, save: SaveConfig, folder: Path
) -> SFLlavaForConditionalGeneration:
    """Write what a run trained, then the whole model around it; return that model in eval mode.

    An align run leaves a whole model, too, though only its projector is new: so any run folder can be chatted with, and
    its captions can be looked at before the next phase begins.

    Args:
        model: as trained, unquantised and unsplit; must not be used afterwards.
        processor: of the model.
        save: how the whole model is written.
        folder: of the run; gets `projector/`, `model/` and, if there are adapters, `adapter/`, each at once.
    """
    if has_adapters(model):
        with write_directory_atomically(folder / "adapter") as temporary:
            save_adapters(model, temporary)
    with write_directory_atomically(folder / PROJECTOR_FOLDER) as temporary:
        save_projector(trained_projector(model), fingerprints_of(model), temporary)
    return write_merged_model(folder / "model", model, processor, save)


def write_merged_model(
    directory: str | Path, model: PeftModel, processor: SFLlavaProcessor, save: SaveConfig
) -> SFLlavaForConditionalGeneration:
    """Fold the adapters in, write the plain model and return it in eval mode; `model` must not be used afterwards."""
    merged = cast_weights(merge_adapters(model), getattr(torch, save.dtype))
    merged.config.use_cache = True  # the Trainer switches it off for training
    write_model_directory(
        directory, merged, processor, max_shard_size=save.max_shard_size, remote_code=save.remote_code
    )
    return merged.eval()


def show_answers(model: Any, processor: SFLlavaProcessor, conversations: Sequence[Conversation]) -> None:
    """Log what the model says to the first question of held-out conversations, beside what was expected."""
    logger.info("Answers to held-out questions:")
    for conversation in conversations:
        answer_index = [message.role for message in conversation.messages].index("assistant")
        asked = conversation.messages[:answer_index]
        prompt = processor.apply_chat_template(
            [{"role": message.role, "content": message.text} for message in asked],
            add_generation_prompt=True,
            tokenize=False,
        )
        num_images = sum(message.text.count(processor.image_token) for message in asked)
        images = [image.open() for image in conversation.images[:num_images]]
        inputs = processor(images=images or None, text=[prompt], return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        expected = conversation.messages[answer_index].text
        logger.info("  %s\n    -> %s   (expected: %s)", asked[-1].text.replace("\n", " "), answer, expected)
