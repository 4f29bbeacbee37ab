"""Answers from recordings: on CUDA a model's forward passes, compiled or not, are recorded as graphs and replayed.

For each token Python starts some twenty kernels a layer, one by one, which can take longer than the kernels do when a
batch is small. A CUDA graph starts all of them at once, but only for inputs of the shapes, and a cache at the address,
that it was recorded with. So prompts are padded to a few lengths, and all answers share one static cache.
`generate` of transformers stays in charge: it calls the same modules, whose forward is exchanged.
"""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from sf_mllm.errors import InputError, first_line

logger = logging.getLogger(__name__)

PROMPT_STEP = 64
"""Prompts are padded to a multiple of this many tokens."""
SHORTEST_CACHE = 512
"""Tokens of the smallest cache; larger ones double."""
_LANGUAGE_MODEL = "language_model"
_PARTS = ("vision_tower", "multi_modal_projector", _LANGUAGE_MODEL)
_MAX_RECORDINGS = 64  # of one module; the one that was not used for longest makes room

Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Takes a function of no arguments; returns what it gives, and what computes that anew, into the same memory, from what
its inputs' memory then holds. After recording the outputs need not be there until the first replay."""


class Replay:
    """Exchanges the forward of a model's parts for recordings; `prepare` makes what `generate` then takes.

    Args:
        model: of transformers' LLaVA family.
        record: how to record.
        compiled: compile what is recorded, which takes minutes for a large language model.

    Raises:
        InputError: the model has other parts, or a cache that cannot be static throughout.
    """

    def __init__(self, model: PreTrainedModel, record: Recorder | None = None, *, compiled: bool = False) -> None:
        self._model = model
        parts: Any = getattr(model, "model", None)
        has_parts = all(hasattr(parts, name) for name in _PARTS)
        if not has_parts or not _is_static(_make_cache(model, SHORTEST_CACHE)):
            raise InputError(
                "This model's answers cannot be recorded as CUDA graphs: it is no LLaVA of transformers, or its "
                "language model has sliding windows; take it as it is."
            )
        record = record or CudaGraphRecorder()
        self._forwards = []
        for name in _PARTS:
            module = getattr(parts, name)
            # Prompts have many lengths, images one size.
            forward = torch.compile(module.forward, dynamic=name == _LANGUAGE_MODEL) if compiled else None
            self._forwards.append(ReplayedForward(module, record, forward))
        self._parts = parts
        self._get_image_features, self._get_placeholder_mask = parts.get_image_features, parts.get_placeholder_mask
        parts.get_image_features, parts.get_placeholder_mask = self._look_once, self._find_placeholders
        self._seen: tuple[Tensor, Any] | None = None
        self._is_counted = False
        names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"  # the latter before transformers 5.24
        self._cache: StaticCache | None = None
        self._cache_shape = (0, 0)

    def prepare(self, inputs: dict[str, Tensor], max_new_tokens: int) -> dict[str, Any]:
        """Pad prompts on the left and give them an empty cache; let the device begin to look at the images.

        It looks while `generate` prepares itself, which takes the host about as long.

        Args:
            inputs: of `generate`, with `input_ids` [B, T] and `attention_mask`; what else is in it stays.
            max_new_tokens: of the longest answer.

        Returns:
            Arguments of `generate`, among them `input_ids` [B, T'] with T' >= T, but for its settings, which must be
            those of `generation_config`. They are good for one call; the next call of `prepare` empties the cache.
        """
        if "pixel_values" in inputs:
            placeholders = int((inputs["input_ids"] == self._model.config.image_token_id).sum())
            with torch.inference_mode():
                features = self._get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
            self._seen = (inputs["pixel_values"], features)
            self._is_counted = placeholders == sum(len(image) for image in features.pooler_output)
        batch, length = inputs["input_ids"].shape
        padding = -length % PROMPT_STEP
        config = self._model.generation_config
        pad = config.pad_token_id if config.pad_token_id is not None else 0  # masked, so that any will do
        return {
            **inputs,
            "input_ids": nn.functional.pad(inputs["input_ids"], (padding, 0), value=pad),
            "attention_mask": nn.functional.pad(inputs["attention_mask"], (padding, 0), value=0),
            self._cache_name: self._empty_cache(batch, length + padding + max_new_tokens),
        }

    def close(self) -> None:
        """Give the model its own forwards back and forget all recordings."""
        for forward in self._forwards:
            forward.close()
        del self._parts.get_image_features, self._parts.get_placeholder_mask
        self._cache, self._cache_shape, self._seen = None, (0, 0), None

    def _look_once(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return features that `prepare` has asked for, or make them."""
        seen, self._seen = self._seen, None
        if seen is not None and seen[0] is pixel_values:
            return seen[1]
        self._is_counted = False
        return self._get_image_features(pixel_values, **kwargs)

    def _find_placeholders(self, input_ids: Any, **kwargs: Any) -> Tensor:
        """Return the model's mask of positions that take visual tokens.

        It counts them, for which the host waits until the device has seen the images; `prepare` has counted before.
        """
        is_counted, self._is_counted = self._is_counted, False
        if is_counted and input_ids is not None:
            return (input_ids == self._model.config.image_token_id)[..., None]
        return self._get_placeholder_mask(input_ids, **kwargs)

    def _empty_cache(self, batch: int, length: int) -> StaticCache:
        capacity = SHORTEST_CACHE
        while capacity < length:
            capacity *= 2
        if self._cache is None or self._cache_shape[0] != batch or self._cache_shape[1] < capacity:
            for forward in self._forwards:  # recordings hold the old one
                forward.forget()
            self._cache, self._cache_shape = _make_cache(self._model, capacity), (batch, capacity)
        else:  # What it holds stays there: it is masked. Overwriting gigabytes would take longer than the prompt.
            layers: list[Any] = self._cache.layers
            torch._foreach_zero_([layer.cumulative_length for layer in layers])
        return self._cache


class ReplayedForward:
    """A module's forward, recorded for each kind of input: first run as it is, then recorded.

    What is to be recorded in its place has a run between them, in which it is compiled. It could not have the first
    one: there a cache takes its memory, and a graph of that would be good for nothing else.

    Inputs of one kind have the same structure, shapes, types and values that are no tensors. What trains, what is being
    compiled or recorded already, and what has a cache that grows is run as it is.

    Args:
        module: its `forward` is exchanged until `close`.
        record: how to record.
        forward: what is recorded in its place, the same but faster; None: itself.
    """

    def __init__(self, module: nn.Module, record: Recorder, forward: Callable[..., Any] | None = None) -> None:
        self._module, self._forward, self._record = module, forward or module.forward, record
        self._first_runs = [module.forward] if forward is None else [module.forward, forward]
        self._recordings: OrderedDict[Any, _Recording | int] = OrderedDict()  # or the number of runs so far
        self._cannot_be_recorded = False
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward returns, tensors as copies that stay."""
        leaves, structure = _flatten((args, kwargs))
        if self._cannot_be_recorded or torch.is_grad_enabled() or torch.compiler.is_compiling() or not leaves:
            return self._forward(*args, **kwargs)
        kind = _kind(leaves, structure)
        if kind is None or _is_recording():
            return self._forward(*args, **kwargs)
        recording = self._recordings.setdefault(kind, 0)
        self._recordings.move_to_end(kind)
        if len(self._recordings) > _MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        if isinstance(recording, int):
            if recording < len(self._first_runs):
                self._recordings[kind] = recording + 1
                return self._first_runs[recording](*args, **kwargs)
            try:
                recording = _Recording(self._forward, leaves, structure, self._record)
            except RuntimeError as error:  # a model that waits for the device in between, for example
                logger.warning(
                    "%s cannot be recorded as a CUDA graph and is run as it is: %s.",
                    type(self._module).__name__,
                    first_line(error),
                )
                self._cannot_be_recorded = True
                return self._forward(*args, **kwargs)
            self._recordings[kind] = recording
        return recording.replay(leaves)

    def forget(self) -> None:
        """Drop all recordings, and the caches that they hold."""
        self._recordings.clear()

    def close(self) -> None:
        """Give the module its own forward back."""
        self.forget()
        del self._module.forward


class _Recording:
    """One recorded call with the memory of its inputs and outputs."""

    def __init__(self, forward: Callable[..., Any], leaves: list[Any], structure: Any, record: Recorder) -> None:
        self._inputs = [_clone(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(self._inputs, structure)
        outputs, self._play = record(lambda: forward(*args, **kwargs))
        self._outputs, self._structure = _flatten(outputs)

    def replay(self, leaves: list[Any]) -> Any:
        for own, given in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self._play()
        # Copies: all recordings use the same memory for what they compute.
        outputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._outputs]
        return tree_unflatten(outputs, self._structure)


class CudaGraphRecorder:
    """Records CUDA graphs that share their memory; they must not be replayed at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record a function of no arguments, see `Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function()
        return outputs, graph.replay


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


def _clone(tensor: Tensor) -> Tensor:
    """Return a copy that is a tensor of inference mode where the given one is: the compiler tells them apart."""
    with torch.inference_mode(tensor.is_inference()):
        copy = torch.empty_like(tensor)
    return copy.copy_(tensor)


def _flatten(values: Any) -> tuple[list[Any], Any]:
    return tree_flatten(values, is_leaf=lambda value: isinstance(value, Cache))


def _kind(leaves: list[Any], structure: Any) -> Any:
    """Return what inputs must have in common with those of a recording, or None if they cannot be recorded."""
    kind: list[Any] = [structure]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kind.append((leaf.shape, leaf.dtype, leaf.device, leaf.stride()))
        elif isinstance(leaf, Cache):
            if not _is_static(leaf):
                return None
            kind.append(leaf)  # by identity: a recording holds the address
        else:
            kind.append((type(leaf), leaf))
    key = tuple(kind)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _is_static(cache: Cache) -> bool:
    """Whether all that changes in a cache is in tensors at fixed places."""
    return isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers)


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _make_cache(model: PreTrainedModel, length: int) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
