"""Random integers of scenes: each is a hash of (seed, stream, scene index), the same on every device."""

from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

LARGEST_WORD = 0xFFFFFFFF
_WORDS_AT_ONCE = 256


@lru_cache(maxsize=128)
def constant(values: tuple, device: torch.device) -> Tensor:
    """Return a tensor of fixed values, copied to a device once: a copy in each step would make the GPU wait."""
    return torch.tensor(values, device=device)


class Draws:
    """Random integers for each scene index; each request uses streams of its own."""

    def __init__(self, seed: int, indices: Tensor) -> None:
        self._seed = seed
        self._indices = indices[:, None].to(torch.int64)
        self._next_stream = 0
        self._ready = self._indices[:, :0]  # words made but not yet handed out: few large requests are quicker

    @property
    def device(self) -> torch.device:
        """Device of the scene indices, on which all numbers are drawn."""
        return self._indices.device

    def words(self, count: int) -> Tensor:
        """Return the next `count` 32-bit words of each scene: [B, count] int64, 0 .. 2**32 - 1."""
        if self._ready.shape[1] < count:
            number = max(count, _WORDS_AT_ONCE)
            streams = torch.arange(self._next_stream, self._next_stream + number, device=self.device)
            self._next_stream += number
            # The seed enters each stream separately: two seeds cannot give the same scenes under shifted indices.
            keys = mix_bits(mix_bits(streams + 0x9E3779B9) ^ mix_bits(self._seed))
            self._ready = torch.cat((self._ready, mix_bits(mix_bits(keys ^ self._indices))), dim=1)
        words, self._ready = self._ready[:, :count], self._ready[:, count:]
        return words

    def integers(self, count: int, bound: int) -> Tensor:
        """Return [B, count] integers from 0 to bound - 1; `bound` is far below 2**31."""
        return (self.words(count) * bound) >> 32

    def uniform(self, count: int) -> Tensor:
        """Return [B, count] float32 in [0, 1), multiples of 2**-24 and so the same on every device."""
        return (self.words(count) >> 8).to(torch.float32) * 2.0**-24


WordT = TypeVar("WordT", int, Tensor)


def mix_bits(words: WordT) -> WordT:
    """Scramble 32-bit words held in int64; one-to-one.

    Source: constants of Chris Wellons' hash-prospector (public domain), both below 2**31, so no product overflows.
    """
    words = words & LARGEST_WORD
    words = ((words ^ (words >> 16)) * 0x21F0AAAD) & LARGEST_WORD
    words = ((words ^ (words >> 15)) * 0x735A2D97) & LARGEST_WORD
    return words ^ (words >> 15)
