import pytest
import torch
from torch import nn

from sf_mllm.bench import encoder
from sf_mllm.bench.conditions import Conditions
from sf_mllm.bench.encoder import measure_encoders, measure_towers
from sf_mllm.bench.images import Images
from sf_mllm.bench.our_towers import EncoderTokens
from sf_mllm.bench.precision import prepare_variant
from sf_mllm.bench.preprocess import measure_preprocessing
from sf_mllm.bench.sizes import ImageSize
from sf_mllm.bench.timing import Spread
from sf_mllm.bench.tower import Tower
from sf_mllm.errors import InputError
from tests.tiny_vlm import make_encoder

CONDITIONS = Conditions(torch.device("cpu"), Images(), repeats=3, seconds=5)
ARRANGEMENT = {"sizes": [None], "batches": [1], "precisions": ["float32"], "modes": ["eager"]}


class Patches(nn.Module):
    """A ViT without blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, kernel_size=8, stride=8)

    def forward(self, pixel_values):
        return self.stem(pixel_values).flatten(2).transpose(1, 2)


class Blind(Patches):
    def forward(self, pixel_values):
        return super().forward(pixel_values * 0)


class OfTheWholeBatch(Patches):
    def forward(self, pixel_values):
        return super().forward(pixel_values - 0.5 * pixel_values.mean(dim=0, keepdim=True))


class OutOfMemory(Patches):
    def forward(self, pixel_values):
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(pixel_values)


class Broken(Patches):
    def forward(self, pixel_values):
        raise AssertionError("Input height (32) should be divisible by 14.")


@pytest.fixture(autouse=True)
def towers(monkeypatch):
    modules = {
        "ours": lambda: EncoderTokens(make_encoder()),
        "vit": Patches,
        "blind": Blind,
        "batch": OfTheWholeBatch,
        "large": OutOfMemory,
        "broken": Broken,
    }

    def find_tower(name):
        if name not in modules:
            raise InputError(f"Tower '{name}' is unknown.")
        return lambda size: Tower(modules[name](), "random", size or ImageSize(32, 32), (0.5,) * 3, (0.2,) * 3, None)

    monkeypatch.setattr(encoder, "find_tower", find_tower)
    monkeypatch.setattr("sf_mllm.bench.preprocess.find_tower", find_tower)


def measure(*names, **changes):
    return list(measure_encoders(names, CONDITIONS, **{**ARRANGEMENT, **changes}))


def test_every_arrangement_is_a_row():
    rows = measure("ours", "vit", batches=[1, 3], precisions=["float32", "bfloat16"])
    assert [(row.model, row.batch, row.precision) for row in rows] == [
        (model, batch, precision)
        for precision in ("float32", "bfloat16")
        for batch in (1, 3)
        for model in ("ours", "vit")
    ]
    for row in rows:
        assert row.outcome == "complete" and row.weights == "random" and row.images == "drawings"
        assert 0 < row.time_ms_q25 <= row.time_ms <= row.time_ms_q75 and row.repeats == 3
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.time_ms, rel=1e-3)
        assert row.threads == torch.get_num_threads()
        assert row.ratio_to == ("ours" if row.model == "vit" else "")
        assert row.peak_memory_gib == ""  # of a CPU nobody knows
        assert (row.relative_error > 1e-4) == (row.precision == "bfloat16")


def test_tokens_of_ours_do_not_grow_with_the_image():
    rows = measure("ours", "vit", sizes=[ImageSize(64, 64), ImageSize(256, 32), ImageSize(32, 256)])
    assert [row.visual_tokens for row in rows if row.model == "ours"] == [6, 6, 6]
    assert [row.visual_tokens for row in rows if row.model == "vit"] == [64, 128, 128]
    assert [(row.width, row.height) for row in rows[::2]] == [(64, 64), (256, 32), (32, 256)]


def test_ratios_are_medians_over_rounds(monkeypatch):
    times = {"ours": Spread((1.0, 2.0, 40.0)), "vit": Spread((4.0, 10.0, 80.0))}
    monkeypatch.setattr(Conditions, "time_in_turns", lambda self, works: {name: times[name] for name in works})
    ours, vit = measure("ours", "vit", batches=[2])
    assert (ours.time_ms, ours.time_ratio, ours.images_per_s) == (2, "", 1000)
    assert (vit.time_ms, vit.time_ratio, vit.images_per_s) == (10, 4, 200)
    assert (vit.time_ratio_q25, vit.time_ratio_q75) == (3, 4.5)


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    class Off(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, pixel_values):
            return self.module(pixel_values).roll(1, dims=1)

    def prepare(module, precision, mode, *settings):
        variant = prepare_variant(module, precision, "eager", *settings)
        return Off(variant) if mode == "compiled" else variant

    monkeypatch.setattr(encoder, "prepare_variant", prepare)
    eager, compiled = measure("ours", modes=["eager", "compiled"])
    assert eager.outcome == "complete"
    assert compiled.outcome.startswith("wrong: relative error") and compiled.time_ms == ""


@pytest.mark.parametrize(
    ("name", "reason"), [("blind", "different inputs give the same output"), ("batch", "relative")]
)
def test_so_is_a_tower_that_does_not_look_at_each_image(name, reason):
    wrong, vit = measure(name, "vit", batches=[3])
    assert wrong.outcome.startswith("wrong: ") and reason in wrong.outcome and wrong.time_ms == ""
    assert vit.outcome == "complete" and vit.time_ratio == ""  # there is nothing to compare with


def test_a_tower_with_a_reference_must_compute_what_that_computes():
    def loader(reference, **tolerances):
        settings = {"reference": reference, "tolerances": tolerances}
        return lambda _: Tower(Patches(), "random", ImageSize(32, 32), (0.5,) * 3, (0.2,) * 3, None, **settings)

    loaders = {"alone": loader(None), "equal": loader(Patches()), "other": loader(OfTheWholeBatch())}
    rows = list(measure_towers(loaders, CONDITIONS, **ARRANGEMENT))
    assert [row.outcome[:21] for row in rows] == ["complete", "complete", "wrong: relative error"]
    assert rows[1].relative_error == 0 and rows[1].ratio_to == "alone" and rows[2].time_ms == ""
    changes = {"precisions": ["bfloat16"]}
    loaders = {"strict": loader(None, bfloat16=1e-6), "usual": loader(None, float32=0)}
    strict, usual = measure_towers(loaders, CONDITIONS, **{**ARRANGEMENT, **changes})
    assert strict.outcome.endswith("at most 1e-06 passes") and usual.outcome == "complete"


def test_out_of_memory_is_a_row_and_the_others_go_on():
    rows = measure("ours", "large", "vit", batches=[1, 4])
    outcomes = {(row.model, row.batch): row.outcome for row in rows}
    assert outcomes.pop(("large", 4)) == "out of memory" and set(outcomes.values()) == {"complete"}
    full = next(row for row in rows if row.outcome == "out of memory")
    assert full.time_ms == full.images_per_s == "" and full.visual_tokens == 16
    assert next(row for row in rows if (row.model, row.batch) == ("vit", 4)).ratio_to == "ours"


def test_a_tower_that_fails_shows_why_and_the_others_go_on(caplog):
    broken, vit = measure("broken", "vit")
    assert broken.outcome == "failed: AssertionError: Input height (32) should be divisible by 14"
    assert "Traceback" in caplog.text and vit.outcome == "complete"


def test_compiled_towers_are_measured_too():
    (row,) = measure("vit", modes=["compiled"], batches=[2])
    assert row.outcome == "complete" and row.mode == "compiled" and row.time_ms > 0


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["vit", "vit"], {}, "Tower 'vit' is given twice"),
        (["vit", "nothing"], {}, "Tower 'nothing' is unknown"),
        (["vit"], {"precisions": ["float32", "tf32"]}, "Precision 'tf32' needs a CUDA device, got cpu"),
        (["vit"], {"modes": ["cuda-graphs"]}, "Mode 'cuda-graphs' needs a CUDA device, got cpu"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(names, changes, message):
    with pytest.raises(InputError, match=message):
        next(measure_encoders(names, CONDITIONS, **{**ARRANGEMENT, **changes}))


def test_preprocessing_is_of_one_image_each_and_needs_a_processor(monkeypatch):
    seen = []

    def find_tower(name):
        preprocess = {"a": lambda picture: seen.append(picture.size), "b": None}[name]
        return lambda size: Tower(Patches(), "random", ImageSize(32, 32), (0.5,) * 3, (0.2,) * 3, preprocess)

    monkeypatch.setattr("sf_mllm.bench.preprocess.find_tower", find_tower)
    times = {"any": Spread((16.0,)), "a": Spread((8.0,))}
    monkeypatch.setattr(Conditions, "time_in_turns", lambda self, works: {name: times[name] for name in works})
    decode, a, b = measure_preprocessing(["a", "b"], CONDITIONS, sizes=[ImageSize(80, 48)])
    assert (decode.step, decode.model, decode.time_ms, decode.images_per_s) == ("decode", "any", 2, 500)
    assert (a.step, a.time_ms, a.images_per_s, a.width, a.height) == ("preprocess", 1, 1000, 80, 48)
    assert set(seen) == {(80, 48)} and len(seen) == 8
    assert b.outcome == "no image processor" and b.time_ms == ""
