"""Which part may import which, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sf_mllm"

_BASE = {"constants", "config", "errors", "assets", "cores", "compiler"}
# The parts of sf_mllm that each part may import, besides itself. Never upward, never sideways.
ALLOWED = {
    "__init__": {"encoder", "vlm", "registration"},  # the lazy public names
    "constants": set(),
    "errors": set(),
    "config": {"errors", "constants"},
    "assets": {"errors", "constants"},
    "regions": set(),
    "cores": set(),
    "compiler": set(),
    "remote_code": _BASE,
    "ops": _BASE,
    "encoder": _BASE | {"ops"},
    "vlm": _BASE | {"ops", "encoder"},
    "registration": {"encoder", "vlm"},
    "data": _BASE,
    "training": _BASE | {"ops", "encoder", "vlm", "data", "registration", "regions", "remote_code"},
    "inference": _BASE | {"ops", "encoder", "vlm", "registration", "regions"},
    "cli": _BASE | {"ops", "encoder", "vlm", "registration", "regions", "inference", "data"},
    "bench": _BASE | {"ops", "encoder", "vlm", "registration", "inference", "data", "training"},
}
# Packages that only these parts or files may import.
ONLY_IN = {
    "argparse": {"errors.py", "cli", "training", "data", "bench"},
    "peft": {"vlm/adapters.py", "training"},
    "open_clip": {"training", "encoder/open_clip_tower.py", "bench/library_towers.py"},
    "timm": {"training", "encoder/vit_timm.py", "bench/library_towers.py"},
    "torchao": {"encoder/quantization.py"},
    "omegaconf": {"config.py", "training"},
    "accelerate": {"training"},
    "matplotlib": {"training/report/figures.py", "bench/plot.py"},
    "datasets": {"data/image_specs.py", "data/image_sources.py", "data/tables.py", "data/conversation_tables.py"},
    "webdataset": {"data/image_specs.py", "data/tar_shards.py"},
}
ENTRY_POINTS = (
    "sf_mllm.cli",
    "sf_mllm.training.bootstrap",
    "sf_mllm.training.reinforce",
    "sf_mllm.training.report",
    "sf_mllm.training.instruct",
    "sf_mllm.training.check_data",
    "sf_mllm.training.merge",
    "sf_mllm.data.scenes",
    "sf_mllm.bench",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Every imported module of a file, at the top, in functions and for type checking."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno} imports a star"
            if node.module == "sf_mllm":
                found += [(f"sf_mllm.{alias.name}", node) for alias in node.names]
            else:
                found.append((node.module or "", node))
    return found


def test_every_part_has_a_rule():
    assert {part_of(path) for path in FILES} == set(ALLOWED)
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction(path):
    part = part_of(path)
    for module, node in imports(path):
        place = f"{path}:{node.lineno}"
        package, _, rest = module.partition(".")
        assert package not in ("scripts", "eval", "tests"), f"{place} imports {module}, which is not installed"
        if package == "sf_mllm" and rest:
            target = rest.partition(".")[0]
            assert target == part or target in ALLOWED[part], f"{place}: {part} may not import {module}"
        if package in ONLY_IN:
            relative = str(path.relative_to(PACKAGE))
            assert part in ONLY_IN[package] or relative in ONLY_IN[package], f"{place} may not import {package}"


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_needs_no_heavy_import(module):
    code = """
import runpy, sys
module, sys.argv = sys.argv[1], [sys.argv[1], "--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "numpy", "PIL", "omegaconf", "open_clip", "peft", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
    result = run_python(code, module)
    assert result.returncode == 0, result.stderr
    assert f"usage: python -m {module}" in result.stdout


def test_the_encoder_needs_torch_and_transformers_only():
    code = """
import sys
for name in ("open_clip", "timm", "peft", "accelerate", "omegaconf", "deepspeed", "datasets", "torchao"):
    sys.modules[name] = None  # importing it raises
import sf_mllm
sf_mllm.SparseFormerModel, sf_mllm.SparseFormerConfig, sf_mllm.SparseFormerImageProcessor
sf_mllm.load_official_checkpoint, sf_mllm.replace_visual, sf_mllm.quantize_cortex
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_is_free_and_every_public_name_exists():
    code = """
import sys
import sf_mllm
assert "torch" not in sys.modules and "transformers" not in sys.modules
for name in sf_mllm.__all__:
    assert getattr(sf_mllm, name).__name__ == name
assert set(sf_mllm.__all__) <= set(dir(sf_mllm))
try:
    sf_mllm.nonsense
except AttributeError:
    sys.exit(0)
sys.exit("no AttributeError")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
