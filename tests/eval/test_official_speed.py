"""The comparison with the official code; SF_MLLM_OFFICIAL names a clone of it for the tests that need one."""

import copy
import csv
import os
from pathlib import Path

import pytest
import torch

from eval.official_model import OfficialCode, OfficialTokens
from eval.official_speed import main, make_towers
from sf_mllm.bench.precision import computing_in
from sf_mllm.encoder.published import PUBLISHED
from sf_mllm.errors import InputError
from tests.encoder.tiny import tiny_config

CLONE = os.environ.get("SF_MLLM_OFFICIAL")
BASE = "sparseformer_btsp_openai_clip_base"
QUICK = ["--device", "cpu", "--size", "base", "--batch", "1", "--precision", "float32", "--mode", "eager"]
needs_clone = pytest.mark.skipif(CLONE is None, reason="SF_MLLM_OFFICIAL names no clone of the official code")


@pytest.fixture(autouse=True)
def other_tests_hear_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sf_mllm.bench.run._quiet_libraries", lambda: None)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose base model is tiny."""
    monkeypatch.setitem(PUBLISHED, BASE, {**tiny_config().to_diff_dict(), "initial_roi_layout": "official_grid"})
    folder = tmp_path / "clone/sparseformer/sparseformer"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "config.py").write_text("from tests.eval.official_stand_in import route_name_to_config\n")
    (folder / "modeling.py").write_text("from tests.eval.official_stand_in import SparseFormer\n")
    return tmp_path / "clone"


def measure(checkout: Path, folder: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    status = main(
        ["--checkout", str(checkout), *QUICK, "--repeats", "2", "--seconds", "1", "--rows", str(folder), *arguments]
    )
    with (folder / "throughput.csv").open() as file:
        return status, list(csv.DictReader(file))


def test_both_are_rows_and_ratios_are_to_the_official_code(stand_in: Path, tmp_path: Path) -> None:
    status, rows = measure(stand_in, tmp_path, "--batch", "1", "3", "--precision", "float32", "bfloat16")
    assert status == 0
    assert [(row["model"], row["precision"], row["batch"]) for row in rows] == [
        (model, precision, batch)
        for precision in ("float32", "bfloat16")
        for batch in ("1", "3")
        for model in ("official:base", "sparseformer:base")
    ]
    for official, ours in zip(rows[::2], rows[1::2], strict=True):
        assert official["outcome"] == ours["outcome"] == "complete"
        assert (official["ratio_to"], ours["ratio_to"]) == ("", "official:base") and float(ours["time_ratio"]) > 0
        assert official["protocol"] == "encoder-speed-1" and official["weights"] == ours["weights"] == "random"
        assert official["visual_tokens"] == ours["visual_tokens"] == "6" and ours["width"] == "224"
    header = (Path(__file__).parents[2] / "eval/results/throughput.csv").read_text(encoding="utf-8").partition("\n")[0]
    assert ",".join(rows[0]) == header


def test_ours_is_not_timed_if_it_computes_something_else(stand_in: Path, tmp_path: Path) -> None:
    config = stand_in / "sparseformer/sparseformer/config.py"
    config.write_text(
        "from tests.eval import official_stand_in\n"
        "def route_name_to_config(name):\n"
        "    config = official_stand_in.route_name_to_config(name)\n"
        "    config['compatible_config']['shift'] = 1\n"
        "    return config\n"
    )
    status, (official, ours) = measure(stand_in, tmp_path)
    assert status == 1 and official["outcome"] == "complete" and float(official["time_ms"]) > 0
    assert ours["outcome"].startswith("wrong: relative error") and ours["time_ms"] == ""


def test_weights_are_drawn_the_same_each_time_and_none_stay_zero(stand_in: Path) -> None:
    code = OfficialCode(stand_in)
    before = torch.get_rng_state()
    first, second = (code.build(BASE).state_dict() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    assert first["layers.0.roi_adjust_module.3.weight"].std() == pytest.approx(0.1, rel=0.3)
    inner = first["layers.0.adaptive_mixing.parameter_generator.2.weight"].shape[1]
    generated = first["layers.0.adaptive_mixing.parameter_generator.2.weight"].std()
    assert generated == pytest.approx(0.1 * inner**-0.5, rel=0.3)
    assert all(tensor.any() for key, tensor in first.items() if key.endswith(".weight"))


def test_the_kernels_of_ours_are_towers_of_their_own(stand_in: Path) -> None:
    towers = make_towers(OfficialCode(stand_in), "base", ["torch", "triton"])
    assert list(towers) == ["official:base", "sparseformer:base", "sparseformer:base@triton"]
    official, ours, fast = towers.values()
    assert isinstance(official.module, OfficialTokens) and official.kernels is None and official.reference is None
    assert ours.reference is fast.reference is official.module and (ours.kernels, fast.kernels) == ("torch", "triton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkout", "{clone}", "--size", "base", "huge"], "No published SparseFormer is named 'huge'."),
        (["--checkout", "{clone}", "--size", "base", "base"], "Size 'base' is given twice; give each once."),
        (["--checkout", "{clone}", "--precision", "int8"], "invalid choice: 'int8'"),
        (["--checkout", "{clone}", *QUICK, "--mode", "cuda-graphs"], "Mode 'cuda-graphs' needs a CUDA device, got cpu"),
        (["--checkout", "/nowhere"], "Checkout '/nowhere' is no directory; give a clone of https://github.com/showlab"),
        (["--checkout", "{tests}"], "lacks sparseformer/sparseformer/__init__.py, so that it is no clone of https://"),
        (["--size", "base"], "The following arguments are required: --checkout"),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], message: str, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"clone": stand_in, "tests": Path(__file__).parent}
    assert main([argument.format(**places) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_clone_that_cannot_be_used_says_what_it_needs(stand_in: Path) -> None:
    config = stand_in / "sparseformer/sparseformer/config.py"
    with pytest.raises(InputError, match=r"used to build .*large here \(.*\); it needs timm, and commit \w+ of https"):
        config.write_text("def route_name_to_config(name):\n    assert name != 'sparseformer_btsp_openai_clip_large'\n")
        OfficialCode(stand_in).build("sparseformer_btsp_openai_clip_large")
    config.write_text("import no_such_package\n")
    with pytest.raises(InputError, match=r"cannot be imported here .*No module named 'no_such_package'"):
        OfficialCode(stand_in)


@needs_clone
def test_the_official_model_is_copied_compiled_as_one_graph_and_equals_ours() -> None:
    official, ours = make_towers(OfficialCode(Path(str(CLONE))), "base", ["torch"]).values()
    pixel_values = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with computing_in("float32", torch.device("cpu")):
        tokens = official.module(pixel_values)
        torch.testing.assert_close(copy.deepcopy(official.module)(pixel_values), tokens, rtol=0, atol=0)
        torch.testing.assert_close(
            ours.module(pixel_values), tokens, rtol=0, atol=1e-3
        )  # measured: 1e-5 of their length
        explanation = torch._dynamo.explain(official.module)(pixel_values)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@needs_clone
def test_the_official_code_is_measured(tmp_path: Path) -> None:
    status, rows = measure(Path(str(CLONE)), tmp_path, "--precision", "float32", "bfloat16")
    assert status == 0 and {row["outcome"] for row in rows} == {"complete"}
    official, ours = rows[2:]
    assert float(ours["relative_error"]) < float(official["relative_error"])  # whose coordinates are in bfloat16, too
