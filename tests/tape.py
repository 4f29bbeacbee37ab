"""Stands in for the recorder of CUDA graphs where there is no CUDA."""

import functools

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapeRecorder(TorchDispatchMode):
    """Runs a function once and notes its operations; from the second replay on they run anew, into their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.played = 0
        self.tape: list = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        call = functools.partial(operation, *args, **(kwargs or {}))
        result = call()
        self.tape.append((call, result))
        return result

    def __call__(self, function):
        tape = self.tape = []
        with self:
            outputs = function()
        self.recorded += 1
        is_first = [True]

        def play() -> None:
            self.played += 1
            for call, result in [] if is_first else tape:
                for own, new in zip(tree_leaves(result), tree_leaves(call()), strict=True):
                    if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                        own.copy_(new)
            is_first.clear()

        return outputs, play
