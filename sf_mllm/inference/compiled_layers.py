"""A language model whose layers are compiled, in the time that one of them takes."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


class CompiledLayers:
    """The forward of a language model whose layers are compiled: one graph for all of them, not one with all of them.

    transformers tells layers apart by their place in the cache, for which the compiler would make a graph each; so each
    layer is given its own part of a static cache, whatever place it asks for.

    Args:
        module: with its layers in `layers`.
    """

    def __init__(self, module: Any) -> None:
        self._forward, self._layers = module.forward, module.layers
        self._run = torch.compile(_run_layer, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward returns."""
        # A layer that somebody has given another forward, as accelerate does for several devices, keeps that.
        places = [place for place, layer in enumerate(self._layers) if "forward" not in vars(layer)]
        for place in places:
            self._layers[place].forward = functools.partial(self._call, place)
        try:
            return self._forward(*args, **kwargs)
        finally:
            for place in places:
                del self._layers[place].forward

    def _call(self, place: int, *args: Any, **kwargs: Any) -> Any:
        parts = {name: _PartOfCache(value.layers[place]) for name, value in kwargs.items() if isinstance(value, Cache)}
        return self._run(self._layers[place], *args, **{**kwargs, **parts})


class _PartOfCache:
    """What one layer sees of a cache."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def update(self, keys: Tensor, values: Tensor, place: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.part.update(keys, values, *args, **kwargs)


def _run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
