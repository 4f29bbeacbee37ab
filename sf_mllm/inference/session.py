"""A conversation about an image: state over several turns, streamed answers; shared by every front end."""

import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria, TextIteratorStreamer

from sf_mllm.errors import InputError, is_valid_text
from sf_mllm.inference.replay import Replay, generation_config
from sf_mllm.regions import seen_area


@dataclass
class AnswerStatistics:
    """What the last answer cost."""

    prompt_tokens: int
    new_tokens: int
    seconds_to_first_text: float
    seconds: float


class _Stop(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class ChatSession:
    """Several turns with one model about at most one image.

    The image goes with the first question that follows `set_image`; a new image starts a new conversation, because the
    models are trained on conversations about one image.

    Attributes:
        image: the image that is talked about, or None.
        statistics: cost of the last answer, or None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Start an empty conversation.

        Args:
            model: from `load_model`.
            processor: from `load_model`; its chat template forms the prompt.
            max_new_tokens: longest answer.
            temperature: 0 takes the likeliest token each time, larger values sample.
            seed: makes sampled answers repeatable; sets torch's global generator.
            replay: of the model, to answer from recordings.
        """
        self.model: Any = model  # `generate` and `get_image_features` are on no common base class
        self.processor: Any = processor
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.image: Image.Image | None = None
        self.statistics: AnswerStatistics | None = None
        self._messages: list[dict[str, Any]] = []
        self._replay = replay
        if seed is not None:
            torch.manual_seed(seed)

    def set_image(self, image: Image.Image) -> None:
        """Talk about this RGB image from now on, in a new conversation."""
        self.image = image
        self.clear()

    def clear(self) -> None:
        """Forget the turns; the image stays."""
        self._messages = []

    def ask(self, prompt: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece while it is generated.

        Closing the iterator early stops the generation; what was said until then stays in the conversation.

        Raises:
            InputError: the prompt is empty, no valid text or contains the image placeholder, or the conversation is
                longer than the language model can read. The conversation is then as it was before.
        """
        prompt = prompt.strip()
        if not prompt:
            raise InputError("The question is empty; ask something.")
        if not is_valid_text(prompt):
            raise InputError("The question is not valid text; give it in UTF-8.")
        placeholder = self.processor.image_token
        if placeholder in prompt:
            raise InputError(f"The question contains '{placeholder}', which stands for the image itself; leave it out.")
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if self.image is not None and not self._messages:
            content.insert(0, {"type": "image", "image": self.image})
        messages = [*self._messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        prompt_tokens = inputs["input_ids"].shape[1]
        room = self.model.config.get_text_config().max_position_embeddings - prompt_tokens
        if room <= 0:
            raise InputError(
                f"The conversation is {prompt_tokens} tokens long, more than the language model can read "
                f"({prompt_tokens + room}); start a new one or ask a shorter question."
            )
        return self._stream(messages, inputs, min(self.max_new_tokens, room))

    def _stream(self, messages: list[dict[str, Any]], inputs: Any, max_new_tokens: int) -> Generator[str, None, None]:
        prompt_tokens = inputs["input_ids"].shape[1]
        started = time.perf_counter()
        if self._replay is not None:
            inputs = self._replay.prepare(inputs, max_new_tokens)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        outcome: dict[str, Any] = {}

        def generate() -> None:
            try:
                with torch.inference_mode():
                    outcome["tokens"] = self.model.generate(
                        **inputs,
                        generation_config=generation_config(max_new_tokens, self.temperature),
                        streamer=streamer,
                        stopping_criteria=[_Stop(stop)],
                    )
            except BaseException as error:  # handed to the reader, who would otherwise wait for ever
                outcome["error"] = error
                streamer.end()

        first: float | None = None
        answer = ""
        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        try:
            for piece in streamer:
                if piece:
                    first = first or time.perf_counter()
                    answer += piece
                    yield piece
        finally:
            stop.set()
            worker.join()
            if "tokens" in outcome:
                ended = time.perf_counter()
                self.statistics = AnswerStatistics(
                    prompt_tokens=prompt_tokens,
                    new_tokens=outcome["tokens"].shape[1] - inputs["input_ids"].shape[1],
                    seconds_to_first_text=(first or ended) - started,
                    seconds=ended - started,
                )
                self._messages = [
                    *messages,
                    {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]},
                ]
        if "error" in outcome:
            raise outcome["error"]

    @torch.inference_mode()
    def regions(self) -> Tensor:
        """Return where the model looks: the final RoIs [N, 4], (x1, y1, x2, y2) relative to `image`, fp32 on the CPU.

        Raises:
            InputError: there is no image, or the model's vision encoder has no RoIs.
        """
        if self.image is None:
            raise InputError("There is no image yet, so there are no regions; set an image first.")
        pixel_values = self.processor.image_processor(images=self.image, return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixel_values.to(self.model.device, self.model.dtype))
        rois = getattr(features, "rois", None)
        if rois is None:
            raise InputError("This model's vision encoder has no regions; they come with a SparseFormer.")
        left, top, right, bottom = seen_area(self.image.size, self.processor.image_processor)
        scale = torch.tensor([right - left, bottom - top]).repeat(2)
        return rois[0, -1].float().cpu() * scale + torch.tensor([left, top]).repeat(2)
