"""One recording of a function for each kind of input, replayed in its place."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer

from sf_mllm.errors import first_line

logger = logging.getLogger(__name__)

_MAX_RECORDINGS = 64  # of one function; the one that was not used for longest makes room

Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Takes a function of no arguments; returns what it gives, and what computes that anew, into the same memory, from what
its inputs' memory then holds. After recording the outputs need not be there until the first replay."""


class Replayed:
    """A function, recorded for each kind of input: first run, in which the compiler may work, then recorded.

    Inputs of one kind have the same structure, shapes, types and values that are no tensors. What trains, what is being
    compiled or recorded already, and what has a cache that grows is run, not recorded.

    Args:
        function: of tensors, caches and settings. It also runs for inputs with a cache that has no memory yet: a cache
            that takes its memory while the compiler looks on gets a graph that is good for nothing else.
        record: how to record.
        name: for messages.
        faster: what is recorded, and run otherwise, in its place.
    """

    def __init__(
        self, function: Callable[..., Any], record: Recorder, name: str, faster: Callable[..., Any] | None = None
    ) -> None:
        self._function, self._faster, self._record, self._name = function, faster or function, record, name
        self._calls: OrderedDict[Any, _Call] = OrderedDict()
        self._cannot_be_recorded = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, tensors as copies that stay."""
        leaves, structure = flatten((args, kwargs))
        if any(isinstance(leaf, Cache) and not has_memory(leaf) for leaf in leaves):
            return self._function(*args, **kwargs)
        if self._cannot_be_recorded or torch.is_grad_enabled() or torch.compiler.is_compiling() or not leaves:
            return self._faster(*args, **kwargs)
        kind = kind_of_inputs(leaves, structure)
        if kind is None or _is_recording():
            return self._faster(*args, **kwargs)
        call = self._calls.get(kind)
        if call is None:
            call = self._calls[kind] = _Call(self._faster, leaves, structure)
            if len(self._calls) > _MAX_RECORDINGS:
                self._calls.popitem(last=False)
            return call.run()
        self._calls.move_to_end(kind)
        if not call.is_recorded:
            try:
                call.record(self._record, leaves)
            except RuntimeError as error:  # a model that waits for the device in between, for example
                logger.warning(
                    "%s cannot be recorded as a CUDA graph and is run as it is: %s.", self._name, first_line(error)
                )
                self._cannot_be_recorded = True
                self._calls.clear()
                return self._faster(*args, **kwargs)
        return call.replay(leaves)

    def forget(self) -> None:
        """Drop all recordings, and the caches that they hold."""
        self._calls.clear()


class _Call:
    """A call with the memory of its inputs, which it is run with, recorded with and replayed with.

    The first run has them, too: what the compiler learns of memory laid out in another way would be no good for these,
    and it would work again while they are recorded, which CUDA does not allow.
    """

    def __init__(self, function: Callable[..., Any], leaves: list[Any], structure: Any) -> None:
        with torch.inference_mode():
            inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._inputs = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        args, kwargs = tree_unflatten(inputs, structure)
        self._function = lambda: function(*args, **kwargs)
        self._outputs: tuple[list[Any], Any] = ([], None)  # leaves and their structure
        self._play: Callable[[], None] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether it can be replayed."""
        return self._play is not None

    def run(self) -> Any:
        """Return what the function returns for the inputs that this was made with."""
        with torch.inference_mode():
            outputs = flatten(self._function())
        return _copy(*outputs)

    def record(self, record: Recorder, leaves: list[Any]) -> None:
        """Make a recording, of which nothing is replayed yet."""
        with torch.inference_mode():
            self._take(leaves)
            outputs, self._play = record(self._function)
        self._outputs = flatten(outputs)

    def replay(self, leaves: list[Any]) -> Any:
        """Return what the function would return."""
        assert self._play is not None, "record first"
        with torch.inference_mode():
            self._take(leaves)
            self._play()
        return _copy(*self._outputs)

    def _take(self, leaves: list[Any]) -> None:
        if self._inputs:
            torch._foreach_copy_(self._inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])


class CudaGraphRecorder:
    """Records CUDA graphs that share their memory; they must not be replayed at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record a function of no arguments, see `Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = function()
        except BaseException:
            # Where recording fails at its start or its end, PyTorch stays in the stream of the recording, and takes the
            # memory for one that is being recorded.
            torch.cuda.set_stream(stream)
            self._pool = None
            raise
        return outputs, graph.replay


def flatten(values: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested values, and their structure; a cache is a leaf."""
    return tree_flatten(values, is_leaf=lambda value: isinstance(value, Cache))


def kind_of_inputs(leaves: list[Any], structure: Any) -> Any:
    """Return what inputs must have in common with those of a recording, or None if they cannot be recorded."""
    kind: list[Any] = [structure]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kind.append((leaf.shape, leaf.dtype, leaf.device, leaf.stride()))
        elif isinstance(leaf, Cache):
            if not is_static(leaf):
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


def is_static(cache: Cache) -> bool:
    """Whether all that changes in a cache is in tensors at fixed places."""
    return isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers)


def has_memory(cache: Cache) -> bool:
    """Whether a cache has taken its memory, which it does when it is first written to."""
    layers: list[Any] = cache.layers
    return all(layer.is_initialized for layer in layers)


def _copy(leaves: list[Any], structure: Any) -> Any:
    """Return outputs whose tensors stay: all recordings use the same memory for what they compute."""
    return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
