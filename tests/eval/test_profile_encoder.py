import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.profile_encoder import (
    ACTIVATIONS,
    ATTENTION,
    CALL,
    MIXING,
    NORMS,
    OTHERS,
    PARTS,
    PEAKS,
    PRODUCTS,
    STEM,
    Work,
    main,
    make_rows,
    measure,
    part_of,
    work_of,
)
from sf_mllm.encoder.configuration_sparseformer import SparseFormerConfig
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel

SMALL = SparseFormerConfig(
    num_latents=9,
    focusing_size=64,
    focusing_num_attention_heads=2,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    projection_size=16,
)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", PRODUCTS),
        ("void cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_32x1_tn_align8", PRODUCTS),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x32x8_stage3_warpsize2x2x1_ffma_aligna4", OTHERS),
        ("triton_poi_fused_mul_sigmoid_view_27", ACTIVATIONS),
        ("triton_poi_fused_gelu_view_7", ACTIVATIONS),
        ("triton_per_fused_add_native_layer_norm_view_31", NORMS),
        ("triton_per_fused_cat_cos_linspace_mul_native_layer_norm_pow_sin_slice_unsqueeze_view_12", OTHERS),
        ("triton_per_fused__to_copy__unsafe_view_add_div_max_pool2d_with_indices_mean_mul_native_layer_norm_0", STEM),
        ("_convolve_kernel", STEM),
        ("_stem_kernel", STEM),
        ("_repack_kernel", STEM),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64_32x4_nhwc>", STEM),
        ("_attend_kernel", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", ATTENTION),
        ("_mix_kernel", MIXING),
        ("Memset (Device)", OTHERS),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_operations_are_those_that_pytorch_counts() -> None:
    model = SparseFormerModel(SMALL).eval()
    images = torch.rand(2, 3, 64, 96)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    counted = {str(name): operations for name, operations in counter.get_flop_counts()["Global"].items()}
    work = work_of(SMALL, 2, (64, 96))
    assert work[STEM].operations == counted["aten.convolution"]
    assert work[MIXING].operations + work[ATTENTION].operations == counted["aten.bmm"]
    # Two layers of ten tokens, repeats of nine: queries times keys, then weights times values.
    assert work[ATTENTION].operations == 2 * 4 * 64 * (2 * 10**2 + SMALL.focusing_repeats * 9**2)
    # What PyTorch counts besides are the coordinates' layers, which compute in float32; the first points are shared.
    coordinates = sum(
        2 * 9 * layer.weight.numel() * images_of_calls
        for layer, images_of_calls in (
            (model.focusing.narrow.sampler.offsets, 2 * SMALL.focusing_repeats - 1),
            (model.focusing.narrow.roi_adjustment.out, 2 * SMALL.focusing_repeats),
            (model.focusing.wide.sampler.offsets, 2),
        )
    )
    assert work[PRODUCTS].operations == counted["aten.addmm"] + counted["aten.mm"] - coordinates


def test_bytes_grow_with_the_batch_and_weights_are_read_once() -> None:
    one, two = (work_of(SMALL, batch, (64, 64)) for batch in (1, 2))
    for part in (ATTENTION, STEM, ACTIVATIONS):
        assert two[part].bytes == 2 * one[part].bytes > 0, part
    for part in (PRODUCTS, MIXING, NORMS):  # some of it is shared by all images
        assert one[part].bytes < two[part].bytes < 2 * one[part].bytes, part
    assert work_of(SMALL, 1, (64, 64), bytes_per_value=4)[NORMS].bytes == 2 * one[NORMS].bytes


def test_a_floor_is_the_larger_of_two_times() -> None:
    assert Work(operations=2e12, bytes=1e9).floor_ms(1000.0, 4.0) == pytest.approx(2.0)
    assert Work(operations=1e9, bytes=2e12).floor_ms(1000.0, 4.0) == pytest.approx(500.0)


def test_what_was_measured_is_divided_among_the_parts() -> None:
    model = SparseFormerModel(SMALL).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        call_ms, kernels = measure(lambda: model(images).last_hidden_state, 4, torch.device("cpu"))
    assert call_ms != call_ms  # only a GPU's clock times calls that are not waited for
    count, milliseconds = kernels["aten::addmm"]
    assert count % 4 == 0 and milliseconds > 0
    rows = make_rows(3.0, {"nvjet": (8, 1.5), "_attend_kernel": (4, 0.25)}, work_of(SMALL, 1, (64, 64)), (989.0, 4.8))
    assert [row["part"] for row in rows] == [CALL, *PARTS]
    times = {row["part"]: row["time_ms"] for row in rows}
    assert times == dict.fromkeys(PARTS, 0.0) | {CALL: 3.0, PRODUCTS: 1.5, ATTENTION: 0.25}
    floors = {row["part"]: row["floor_ms"] for row in rows}
    assert floors.pop(OTHERS) == ""
    assert floors.pop(CALL) == pytest.approx(sum(floors.values()), abs=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "A profile needs a CUDA device, and there is none" in capsys.readouterr().err


def test_the_floors_that_the_readme_names() -> None:
    peak = PEAKS["H200"]
    floors, sums = {}, {}
    for size in ("base", "large"):
        work = work_of(SparseFormerConfig.from_name(f"sparseformer_btsp_openai_clip_{size}"), 256, (224, 224))
        floors = {part: work[part].floor_ms(*peak) for part in PARTS}
        sums[size] = sum(floors.values())
    expected = {PRODUCTS: 7.5, NORMS: 1.3, ACTIVATIONS: 1.0, ATTENTION: 0.5, MIXING: 0.3, STEM: 0.06}
    for part, milliseconds in expected.items():
        assert floors[part] == pytest.approx(milliseconds, rel=0.12), part
    assert sums == {"base": pytest.approx(3.1, abs=0.05), "large": pytest.approx(10.6, abs=0.06)}
