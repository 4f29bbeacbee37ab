"""Answers from recordings: on CUDA a model's forward passes, compiled or not, are recorded as graphs and replayed.

For each token Python starts some twenty kernels a layer, one by one, which can take longer than the kernels do when a
batch is small. A CUDA graph starts all of them at once, but only for inputs of the shapes, and a cache at the address,
that it was recorded with. So prompts are padded to a few lengths, and all answers share one static cache.
`generate` of transformers stays in charge: it calls the same model, whose forward is exchanged. It keeps the host
busy for a while before it asks for the first token; so the device begins with the prompt before it is called, in a
stream of its own: `generate` moves settings to the device and reads values back, and would wait each time until the
prompt is through. Images come first, and the host prepares the prompt while the device looks at them.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LlavaForConditionalGeneration, PreTrainedModel, StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sf_mllm.compiler import mend_compiler
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.errors import InputError
from sf_mllm.inference.compiled_layers import CompiledLayers
from sf_mllm.inference.recordings import (
    CudaGraphRecorder,
    Recorder,
    Replayed,
    flatten,
    has_memory,
    is_static,
    kind_of_inputs,
)
from sf_mllm.ops.kernels import AUTOMATIC, choose_kernels

PROMPT_STEP = 64
"""Prompts are padded to a multiple of this many tokens."""
SHORTEST_CACHE = 512
"""Tokens of the smallest cache; larger ones double."""
_OF_IMAGES = ("pixel_values", "image_sizes")


class Replay:
    """Exchanges a model's forward and `get_image_features` for recordings; `prepare` makes what `generate` takes.

    Args:
        model: a LLaVA of transformers, or one of ours.
        record: how to record.
        compiled: compile what is recorded, in the first two answers. An encoder of ours gets the kernels that are the
            fastest for its device, see `choose_kernels`.

    Raises:
        InputError: the model is another one, or has a cache that cannot be static throughout.
    """

    def __init__(self, model: PreTrainedModel, record: Recorder | None = None, *, compiled: bool = False) -> None:
        self._model: Any = model
        is_llava = isinstance(model, LlavaForConditionalGeneration)
        if not is_llava or not is_static(_make_cache(model, SHORTEST_CACHE)):
            raise InputError(
                "This model's answers cannot be recorded as CUDA graphs: it is no LLaVA of transformers, or its "
                "language model has sliding windows; take it as it is."
            )
        record = record or CudaGraphRecorder()
        parts: Any = model.model
        # Also where a tower has been put around one of ours.
        encoders = [part for part in parts.vision_tower.modules() if isinstance(part, SparseFormerModel)]
        self._kernels = [(encoder, encoder.kernels) for encoder in encoders]
        self._compiled_forwards: dict[nn.Module, Callable[..., Any]] = {}
        if compiled:
            mend_compiler()
            for encoder in encoders:
                encoder.set_kernels(choose_kernels(AUTOMATIC, encoder.device))
            for part in (parts.vision_tower, parts.multi_modal_projector):
                self._compiled_forwards[part] = torch.compile(part.forward, dynamic=False)  # images have one size
            self._compiled_forwards[parts.language_model] = _compile_language_model(parts.language_model)
        self._get_image_features, self._get_placeholder_mask = parts.get_image_features, parts.get_placeholder_mask
        self._model_forward = model.forward
        self._make_masks: Any = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        name, looking, reading = type(model).__name__, None, None
        if compiled:
            looking, reading = self._compile_within(self._look), self._compile_within(self._read)
        self._look_recorded = Replayed(self._look, record, f"The vision part of {name}", looking)
        self._read_recorded = Replayed(self._read, record, name, reading)

        @functools.wraps(model.forward)  # `generate` reads the signature
        def answer(*args: Any, **kwargs: Any) -> Any:
            return self._take_begun(*args, **kwargs)

        self._exchanges = [
            _exchange(parts, get_image_features=self._look_once, get_placeholder_mask=self._find_placeholders),
            _exchange(model, forward=answer, create_masks_for_generate=self._find_mask),
        ]
        self._seen: tuple[Tensor, Any] | None = None  # pixels and what the model makes of them
        self._begun: _Begun | None = None
        self._num_placeholders: int | None = None
        names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # the latter before transformers 5.24
        self._cache: StaticCache | None = None
        self._cache_shape = (0, 0)
        self._fronts: dict[int, StaticCache] = {}  # of the cache, by their length
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._works_aside = False

    def prepare(self, inputs: dict[str, Tensor], max_new_tokens: int) -> dict[str, Any]:
        """Pad prompts on the left, give them an empty cache, and have the device begin with their forward pass.

        It computes while `generate` prepares itself, which then finds the result there.

        Args:
            inputs: of `generate`, with `input_ids` [B, T] and `attention_mask`; what else is in it stays.
            max_new_tokens: of the longest answer.

        Returns:
            Arguments of `generate`, among them `input_ids` [B, T'] with T' >= T, but for its settings, which must be
            those of `generation_config`. They are good for one call; the next call of `prepare` empties the cache.

        Raises:
            ValueError: the model's own, if images and prompts do not go together.
        """
        self._forget_begun()
        if (pixel_values := inputs.get("pixel_values")) is not None:
            images = {name: inputs[name] for name in _OF_IMAGES if inputs.get(name) is not None}
            with torch.inference_mode(), self._aside():
                self._seen = (pixel_values, self._look_recorded(**images, return_dict=True))
        batch, length = inputs["input_ids"].shape
        padding = -length % PROMPT_STEP
        config = self._model.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else 0  # masked, so that any will do
        mask = nn.functional.pad(inputs["attention_mask"], (padding, 0), value=0)
        given = {
            **inputs,
            "input_ids": nn.functional.pad(inputs["input_ids"], (padding, 0), value=pad),
            "attention_mask": mask,
            "position_ids": (mask.long().cumsum(dim=-1) - 1).clamp(min=0),
            self._cache_name: self._empty_cache(batch, length + padding + max_new_tokens),
        }
        num_placeholders = int((inputs["input_ids"] == self._model.config.image_token_id).sum())
        with torch.inference_mode(), self._aside():
            self._begun = self._begin(given, num_placeholders)
        return given

    def close(self) -> None:
        """Give the model back what it had and forget all recordings."""
        for give_back in reversed(self._exchanges):
            give_back()
        for encoder, kernels in self._kernels:
            encoder.set_kernels(kernels)
        self._forget_begun()
        self._look_recorded.forget()
        self._read_recorded.forget()
        self._cache, self._cache_shape = None, (0, 0)
        self._fronts.clear()

    def _compile_within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function in which the model's parts are compiled."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            exchanges = [_exchange(part, forward=forward) for part, forward in self._compiled_forwards.items()]
            try:
                return function(*args, **kwargs)
            finally:
                for give_back in exchanges:
                    give_back()

        return run

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Let the device work beside what the host asks for afterwards, until `_join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._works_aside = True
        with torch.cuda.stream(self._stream):
            yield

    def _join(self) -> None:
        """Let what the host asks for from now on wait, on the device, for what was begun aside."""
        if self._stream is not None and self._works_aside:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._works_aside = False

    def _begin(self, given: dict[str, Any], num_placeholders: int) -> "_Begun":
        """Start the forward pass that `generate` will ask for first."""
        cache: Any = given[self._cache_name]
        features = None if self._seen is None else self._seen[1].pooler_output
        front, mask = cache, given["attention_mask"]
        if makes_mask := self._model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
            # transformers would have prompts look at all of the cache, and ask the device what the host knows.
            front = self._front(cache, mask.shape[1])
            mask = _causal_mask(mask, front.layers[0].max_cache_len)
        arguments = self._model.prepare_inputs_for_generation(
            **{**given, "attention_mask": mask}, is_first_iteration=True, use_cache=True, logits_to_keep=1
        )
        fits = features is None or num_placeholders == sum(map(len, features))  # else the model says so
        read = self._read_recorded if fits else self._read
        self._num_placeholders = num_placeholders
        try:
            output = read(features, **{**arguments, self._cache_name: front}, return_dict=True)
        finally:
            self._num_placeholders = None
        output[self._cache_name] = cache
        if makes_mask:  # `generate` knows of no front
            arguments["attention_mask"] = nn.functional.pad(mask, (0, cache.layers[0].max_cache_len - mask.shape[-1]))
        lengths = [layer.cumulative_length for layer in cache.layers]
        # `generate` shall find an empty cache, and not wait for the device to hear that it is.
        torch._foreach_zero_(lengths)
        vars(cache)["get_seq_length"] = _no_length
        return _Begun(_kind_of(arguments), arguments.get("attention_mask"), output, lengths, given["input_ids"].shape)

    def _read(self, features: Any, **arguments: Any) -> Any:
        """Run the model's own forward, given what it has made of the images."""
        seen = self._seen
        if features is not None:
            self._seen = (arguments["pixel_values"], BaseModelOutputWithPooling(pooler_output=features))
        try:
            return self._model_forward(**arguments)
        finally:
            self._seen = seen

    def _look(self, **arguments: Any) -> Any:
        """Return what the model makes of images, but for the hidden states of all layers, which nothing here reads."""
        features = self._get_image_features(**arguments)
        if getattr(features, "hidden_states", None) is not None:
            features["hidden_states"] = None
        return features

    def _take_begun(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: returns what `prepare` has begun if that is what is asked for."""
        begun = self._begun
        is_begun = begun is not None and not args and begun.kind == _kind_of(kwargs) and self._has_seen(kwargs)
        self._forget_begun()
        with torch.inference_mode(not torch.is_grad_enabled()):  # in which the cache has taken its memory
            if begun is not None and is_begun:
                torch._foreach_add_(begun.lengths, begun.shape[1])
                return begun.output
            if args or any(kwargs.get(name) is not None for name in (*_OF_IMAGES, "mm_encoder_outputs")):
                return self._model_forward(*args, **kwargs)
            return self._read_recorded(None, **kwargs)

    def _forget_begun(self) -> None:
        self._join()  # before the memory that the work aside reads and writes can be used for something else
        self._seen = self._begun = None
        if self._cache is not None:
            vars(self._cache).pop("get_seq_length", None)

    def _has_seen(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward pass is asked for with the images that `prepare` has begun with, or without any."""
        pixel_values, features = self._seen or (None, None)
        looked = arguments.get("mm_encoder_outputs") or {}  # from transformers 5.24 on `generate` itself looks
        return looked.get("image") is features if looked else arguments.get("pixel_values") is pixel_values

    def _look_once(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return features that are there, or make them."""
        if self._seen is not None and self._seen[0] is pixel_values:
            return self._seen[1]
        return self._look_recorded(pixel_values=pixel_values, **kwargs)

    def _find_mask(self, **kwargs: Any) -> Any:
        """Return the mask of a prompt that `prepare` has begun, or make one."""
        if self._begun is not None and kwargs["inputs_embeds"].shape[:2] == self._begun.shape:
            return self._begun.mask
        return self._make_masks(**kwargs)

    def _find_placeholders(self, input_ids: Any, inputs_embeds: Any, image_features: Any) -> Tensor:
        """Return the model's mask of positions that take visual tokens.

        It counts them, for which the host waits until the device has seen the images; `prepare` has counted before.
        """
        if input_ids is not None and self._num_placeholders == len(image_features):
            return (input_ids == self._model.config.image_token_id)[..., None]
        return self._get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)

    def _empty_cache(self, batch: int, length: int) -> StaticCache:
        capacity = SHORTEST_CACHE
        while capacity < length:
            capacity *= 2
        if self._cache is None or self._cache_shape[0] != batch or self._cache_shape[1] < capacity:
            self._read_recorded.forget()  # recordings hold the old one
            self._fronts.clear()
            self._cache, self._cache_shape = _make_cache(self._model, capacity), (batch, capacity)
        else:  # What it holds stays there: it is masked. Overwriting gigabytes would take longer than the prompt.
            layers: list[Any] = self._cache.layers
            with torch.inference_mode():
                torch._foreach_zero_([layer.cumulative_length for layer in layers])
        return self._cache

    def _front(self, cache: StaticCache, length: int) -> Any:
        """Return the first places of the cache as a cache in the same memory, so that prompts attend to no others."""
        if not has_memory(cache):
            return cache
        if length not in self._fronts:
            front = self._fronts[length] = copy.copy(cache)
            front.layers = [copy.copy(layer) for layer in cache.layers]
            layers: list[Any] = front.layers
            for layer in layers:
                layer.max_cache_len = length
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return self._fronts[length]


@dataclass(frozen=True)
class _Begun:
    """The forward pass of prompts that the device has begun."""

    kind: Any
    """Of its arguments, see `_kind`."""
    mask: Any
    output: Any
    lengths: list[Tensor]
    """Of the cache's layers, set back to zero."""
    shape: torch.Size
    """Of the prompts, [B, T]."""


def generation_config(max_new_tokens: int, temperature: float = 0.0, **settings: Any) -> GenerationConfig:
    """Return settings of `generate`; what they leave open is the model's own.

    Given one by one in place of such an object they would make transformers build the model's configuration anew with
    all its defaults for each answer, which takes longer than the prompt of a recorded model.

    Args:
        max_new_tokens: of the longest answer.
        temperature: 0 takes the likeliest token each time, larger values sample.
        settings: further fields of `GenerationConfig`.
    """
    # Greedy: neutral values in place of the model's own, of which transformers would say that they have no effect.
    sampling: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    # Else transformers would compile the steps after the prompt as soon as the cache is static.
    return GenerationConfig(max_new_tokens=max_new_tokens, disable_compile=True, **sampling, **settings)


def _compile_language_model(module: nn.Module) -> Callable[..., Any]:
    if hasattr(module, "layers"):
        return CompiledLayers(module)
    return torch.compile(module.forward, dynamic=True)  # prompts have many lengths


def _kind_of(arguments: dict[str, Any]) -> Any:
    """Return what arguments of the whole model have in common with others that ask for the same, but for images."""
    names = sorted(arguments.keys() - {"return_dict", "pixel_values", "mm_encoder_outputs"})
    return kind_of_inputs(*flatten({name: arguments[name] for name in names}))


def _exchange(module: nn.Module, **methods: Any) -> Callable[[], None]:
    """Give a module other methods; return what gives it back those that it had, of its own or of its class."""
    had = {name: vars(module)[name] for name in methods if name in vars(module)}
    vars(module).update(methods)

    def give_back() -> None:
        for name in methods:
            del vars(module)[name]
        vars(module).update(had)

    return give_back


def _no_length(layer_idx: int = 0) -> int:
    """`get_seq_length` of an empty cache."""
    return 0


def _causal_mask(mask: Tensor, capacity: int) -> Tensor:
    """Return which places of an empty cache each token of a prompt sees.

    Args:
        mask: [B, T], 0 for padding.
        capacity: places, C >= T.

    Returns:
        [B, 1, T, C], bool.
    """
    earlier = torch.ones(mask.shape[1], capacity, dtype=torch.bool, device=mask.device).tril()
    return earlier & nn.functional.pad(mask.bool(), (0, capacity - mask.shape[1]))[:, None, None, :]


def _make_cache(model: PreTrainedModel, length: int) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
