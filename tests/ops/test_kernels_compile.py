"""The Triton kernels compile for GPUs, on any machine: interpreted kernels may do what no GPU can."""

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sf_mllm.ops import (  # noqa: E402
    attention_triton,
    convolution_triton,
    mixing_triton,
    pooling_triton,
    sampling_triton,
    stem_triton,
)

WHOLE = "i32"
SIZES = dict.fromkeys(
    [
        *(
            "height",
            "width",
            "result_height",
            "result_width",
            "num_results",
            "num_pixels",
            "num_points",
            "points_per_image",
        ),
        *("num_tokens", "tokens_per_image", "stride_image", "stride_channel", "stride_row", "stride_column"),
        *("num_groups", "num_pairs", "padded_height", "padded_groups", "convolved_height", "convolved_width"),
    ],
    WHOLE,
)
FLOATS = {
    **dict.fromkeys(["scale", "natural_scale"], "fp32"),
    **dict.fromkeys(["points", "points_grad", "features_grad", "deviations"], "*fp32"),
    "largest": "*u8",
}
ATTENTION = {"HEADS": 16, "WIDTH": 64, "BLOCK_TOKENS": 64, "BLOCK_WIDTH": 64}
SAMPLING = {"CHANNELS": 64, "BORDER": True, "BLOCK_POINTS": 16, "BLOCK_CHANNELS": 64}
MIXING = {**SAMPLING, "POINTS": 16, "OUTPUTS": 32, "BLOCK_OUTPUTS": 32}
CONVOLUTION = {"CHANNELS": 64, "BLOCK_CHANNELS": 64, "BLOCK_PIXELS": 128, "NUM_BLOCKS": 5, "BLOCK_TAPS": 32}
POOLING = {"CHANNELS": 64, "BLOCK_CHANNELS": 64, "BLOCK_PIXELS": 16}
STEM = {"CHANNELS": 64, "BLOCK_CHANNELS": 64, "BLOCK_PAIRS": 64, "ROWS": 7, "EPS": 1e-5}
KERNELS = [
    (attention_triton, "_attend_kernel", ATTENTION),
    (attention_triton, "_attend_backward_kernel", ATTENTION),
    (sampling_triton, "_sample_kernel", SAMPLING),
    (sampling_triton, "_sample_backward_kernel", {**SAMPLING, "WITH_FEATURES": True}),
    (mixing_triton, "_mix_kernel", MIXING),
    (mixing_triton, "_mix_backward_kernel", {**MIXING, "WITH_FEATURES": True}),
    (convolution_triton, "_convolve_kernel", CONVOLUTION),
    (pooling_triton, "_pool_kernel", {**POOLING, "EPS": 1e-5}),
    (pooling_triton, "_unnormalise_kernel", POOLING),
    (pooling_triton, "_unpool_kernel", POOLING),
    (stem_triton, "_repack_kernel", {"BLOCK_GROUPS": 128}),
    (stem_triton, "_stem_kernel", STEM),
]
"""With the constants of the large published encoder."""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel[0].__name__.split('.')[-1]}{kernel[1]}")
def test_a_kernel_compiles(kernel: tuple[Any, str, dict[str, int]], capability: int) -> None:
    module, name, constants = kernel
    function = getattr(module, name)
    types = {argument: SIZES.get(argument, FLOATS.get(argument, "*bf16")) for argument in function.arg_names}
    signature = {argument: "constexpr" if argument in constants else kind for argument, kind in types.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 100 * 1024  # of one program; an A100 has 164 KB for all that run at a time
