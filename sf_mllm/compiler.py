"""PyTorch's compiler, mended where releases of it compute something else than the model on CUDA devices."""

import functools
from typing import Any

import torch
from torch.torch_version import TorchVersion

_MENDED_IN = "2.14"
_TAG = "sf_mllm-barriers"


@functools.cache
def mend_compiler() -> None:
    """Make `torch.compile` write kernels that see their own results; to be called before anything is compiled.

    What Inductor fuses over a long row becomes several loops, of which a later one may read from memory what an earlier
    one has written. Triton is free to give an element to another warp there, which then can read it before it has been
    written: a value of whatever lay in that memory before, now and then no number at all. With PyTorch 2.11 on an H200
    a ViT's output in bfloat16 differed so from run to run. From 2.14 on PyTorch puts a barrier between such loops;
    with earlier releases this does. It holds for the whole process, and does nothing where it is not needed.
    """
    if TorchVersion(torch.__version__) < _MENDED_IN:
        put_barriers()


def put_barriers() -> None:
    """Let each loop that reads what an earlier one has written begin when all warps have done so."""
    from torch._inductor.codegen.triton import TritonKernel

    load = TritonKernel.load

    @functools.wraps(load)
    def load_what_is_written(self: Any, name: str, index: Any) -> Any:
        if name in self.cse.invalidated_stores:  # written in a loop that has ended
            self.body.writeline("tl.debug_barrier()")
        return load(self, name, index)

    TritonKernel.load = load_what_is_written  # type: ignore[method-assign]
    # Kernels that were compiled without lie in PyTorch's cache on the disk.
    torch.compiler.config.cache_key_tag += _TAG
