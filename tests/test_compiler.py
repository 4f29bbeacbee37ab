"""Kernels that PyTorch's compiler writes see their own results."""

import functools
import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sf_mllm import compiler

WIDTH = 4096  # too long a row for one piece


def norm_twice(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The second norm reads what the first one has written, which is an output, too."""
    first = F.layer_norm(rows.float(), (WIDTH,), weight)
    return first, F.layer_norm(first, (WIDTH,), weight).to(rows.dtype)


@pytest.fixture
def unmended(monkeypatch):
    """PyTorch as it is, whatever other tests have done, and again afterwards."""
    from torch._inductor.codegen.triton import TritonKernel

    load = TritonKernel.load
    monkeypatch.setattr(TritonKernel, "load", getattr(load, "__wrapped__", load))
    torch._dynamo.reset()
    with torch.compiler.config.patch(cache_key_tag=""):
        yield TritonKernel
    torch._dynamo.reset()


def write_kernel(monkeypatch) -> str:
    """Return the code of the one Triton kernel of `norm_twice`; nothing on a CPU could run it."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.exc import InductorError

    written: list[str] = []
    write = PyCodeCache.write
    monkeypatch.setattr(PyCodeCache, "write", lambda code, *args: written.append(code) or write(code, *args))
    monkeypatch.setattr("torch.utils._triton.triton_hash_with_backend", lambda: "")
    refused = pytest.raises((InductorError, BackendCompilerFailed), match="compatible backends for target")
    with torch._inductor.config.patch(cpu_backend="triton", fx_graph_cache=False), refused:
        torch.compile(norm_twice, dynamic=False)(torch.randn(8, WIDTH), torch.randn(WIDTH))
    monkeypatch.setattr(PyCodeCache, "write", write)
    (code,) = (code for code in written if "async_compile.triton(" in code)
    return code


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_loop_waits_for_what_an_earlier_one_has_written(unmended, monkeypatch):
    lines = write_kernel(monkeypatch).splitlines()
    stores = [index for index, line in enumerate(lines) if "tl.store(" in line]
    written = re.search(r"tl\.store\((\w+) ", lines[stores[0]]).group(1)
    assert any(f"tl.load({written} " in line for line in lines[stores[0] :])  # what goes wrong without
    assert not any("debug_barrier" in line for line in lines)

    torch._dynamo.reset()
    compiler.put_barriers()
    assert torch.compiler.config.cache_key_tag
    lines = write_kernel(monkeypatch).splitlines()
    store = next(index for index, line in enumerate(lines) if f"tl.store({written} " in line)
    load = next(index for index, line in enumerate(lines) if f"tl.load({written} " in line)
    (barrier,) = (index for index, line in enumerate(lines) if line.strip() == "tl.debug_barrier()")
    (loop,) = (index for index, line in enumerate(lines) if "in tl.range" in line and store < index < load)
    assert store < barrier < loop < load
    assert lines[barrier].index("tl.") == lines[loop].index("for")  # between the loops, in neither


@pytest.mark.parametrize(("version", "is_mended"), [("2.9.1", True), ("2.13.0+cu130", True), ("2.14.0", False)])
def test_releases_that_need_it_are_mended_once(unmended, monkeypatch, version, is_mended):
    # `torch.__version__` itself is read by much else.
    monkeypatch.setattr(compiler, "torch", SimpleNamespace(__version__=version, compiler=torch.compiler))
    mend = functools.cache(compiler.mend_compiler.__wrapped__)
    load = unmended.load
    for _ in range(2):
        mend()
    assert getattr(unmended.load, "__wrapped__", None) is (load if is_mended else None)
    assert bool(torch.compiler.config.cache_key_tag) == is_mended


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_read_before_it_is_written_on_a_gpu():
    compiler.mend_compiler()
    torch._dynamo.reset()
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(50_000, WIDTH, generator=generator, device="cuda").to(torch.bfloat16)
    weight = torch.randn(WIDTH, generator=generator, device="cuda")
    expected = norm_twice(rows, weight)
    compiled = torch.compile(norm_twice, dynamic=False)
    for _ in range(5):
        torch.full((2 * rows.numel(),), torch.nan, device="cuda")  # freed at once: where results will lie
        for own, reference in zip(compiled(rows, weight), expected, strict=True):
            torch.testing.assert_close(own, reference, rtol=2e-2, atol=2e-2)
