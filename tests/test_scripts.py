"""The shell scripts: which Python they choose, when they install, and that arguments pass through."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])

# Stands for the interpreter of an environment: notes what pip is asked for and knows the project once installed.
FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
  *"-m pip install"*) for last; do :; done; echo "$last" >>"{log}" ;;
  *"import os, sf_mllm"*) [ -s "{log}" ] && echo "{root}" ;;
  *) exec "{python}" "$@" ;;
esac
"""


def run_bash(script: str, *, cwd: Path | str = "/", **environment: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=base | environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the scripts need, in a place with a blank in its path."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def environment(tmp_path, checkout):
    """An active environment whose pip only takes notes; returns (prefix, function that reads the notes)."""
    prefix, log = tmp_path / "an environment", tmp_path / "pip.log"
    python = prefix / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(log=log, root=checkout, python=sys.executable))
    python.chmod(0o755)
    return prefix, lambda: log.read_text().splitlines() if log.exists() else []


def show_python(checkout: Path, extra: str = "") -> str:
    return f'set -euo pipefail; source "{checkout}/scripts/_env.sh"; sf_python {extra}; echo "$PYTHON|$SF_ROOT"'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_a_named_python_is_used_as_it_is(checkout):
    result = run_bash(show_python(checkout, "test"), SF_MLLM_PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{sys.executable}|{checkout}\n", "")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("name", "expected"), [("no-such-program", "is not a program"), ("/bin/false", ">= 3.10")])
def test_a_named_python_that_cannot_serve(checkout, name, expected):
    result = run_bash(show_python(checkout), SF_MLLM_PYTHON=name)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and expected in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_environment_is_installed_into_once(checkout, environment, variable):
    prefix, installed = environment
    for _ in range(2):
        result = run_bash(show_python(checkout), **{variable: str(prefix)})
        assert (result.returncode, result.stdout) == (0, f"{prefix}/bin/python3|{checkout}\n"), result.stderr
    assert installed() == [str(checkout)]
    assert result.stderr == ""


def test_an_extra_is_installed_once_and_serves_the_plain_case_too(checkout, environment):
    prefix, installed = environment
    for extra in ("test", "", "test"):
        assert run_bash(show_python(checkout, extra), VIRTUAL_ENV=str(prefix)).returncode == 0
    assert installed() == [f"{checkout}[test]"]


def test_changed_requirements_are_installed_again(checkout, environment):
    prefix, installed = environment
    run_bash(show_python(checkout), VIRTUAL_ENV=str(prefix))
    (checkout / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    run_bash(show_python(checkout), VIRTUAL_ENV=str(prefix))
    run_bash(show_python(checkout), VIRTUAL_ENV=str(prefix))
    assert installed() == [str(checkout)] * 2


def test_an_environment_of_another_checkout_is_installed_again(checkout, environment):
    prefix, installed = environment
    run_bash(show_python(checkout, "test"), VIRTUAL_ENV=str(prefix))
    python = prefix / "bin" / "python3"
    python.write_text(python.read_text().replace(f'echo "{checkout}"', 'echo "/elsewhere"'))
    run_bash(show_python(checkout, "test"), VIRTUAL_ENV=str(prefix))
    assert installed() == [f"{checkout}[test]"] * 2


def test_failed_install_is_said_and_tried_again(checkout, environment):
    prefix, installed = environment
    python = prefix / "bin" / "python3"
    works = python.read_text()
    python.write_text(works.replace("for last; do :; done; echo", "exit 1; echo"))
    result = run_bash(show_python(checkout), VIRTUAL_ENV=str(prefix))
    assert result.returncode == 2 and "pip could not install" in result.stderr and result.stdout == ""
    python.write_text(works)
    assert run_bash(show_python(checkout), VIRTUAL_ENV=str(prefix)).returncode == 0
    assert installed() == [str(checkout)]


def test_environment_without_a_usable_python(checkout, tmp_path):
    result = run_bash(show_python(checkout), VIRTUAL_ENV=str(tmp_path / "gone"))
    assert result.returncode == 2 and "has no Python >= 3.10" in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with the tools that the scripts use and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "sh", "dirname", "cat", "rm"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def test_machine_without_python(checkout, bare_path):
    old = bare_path / "python3"
    old.symlink_to("/bin/false")  # too old, as far as the version check can tell
    result = run_bash(show_python(checkout), PATH=str(bare_path))
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: No Python >= 3.10 found on PATH; install one from your package manager or python.org.\n"
    )


def test_python_without_venv_leaves_nothing_behind(checkout, bare_path):
    python = bare_path / "python3.12"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"-m venv"*) mkdir -p "$4"; exit 1 ;; *) exec "{sys.executable}" "$@" ;; esac\n'
    )
    python.chmod(0o755)
    (bare_path / "mkdir").symlink_to(shutil.which("mkdir"))
    result = run_bash(show_python(checkout), PATH=str(bare_path))
    assert result.returncode == 2 and "apt install python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_fresh_environment_is_made_in_the_checkout(checkout, bare_path):
    python = bare_path / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    make = f'source "{checkout}/scripts/_env.sh"; sf_make_venv "$SF_ROOT/.venv"'
    use = '"$SF_ROOT/.venv/bin/python3" -m pip --version'
    result = run_bash(f"{make}; {use}", PATH=str(bare_path))
    assert result.returncode == 0, result.stderr
    assert str(checkout / ".venv") in result.stdout


def test_test_script_passes_its_arguments_from_any_directory(tmp_path):
    result = run_bash(f'bash "{ROOT}/scripts/test.sh" --version', cwd=tmp_path, SF_MLLM_PYTHON=sys.executable)
    assert result.returncode == 0 and result.stdout.startswith("pytest "), result.stderr


@pytest.mark.parametrize("script", ["bootstrap_clip.sh", "reinforce.sh", "finetune_llava.sh"])
def test_stage_scripts_pass_their_arguments_from_any_directory(tmp_path, script):
    arguments = "nothing.yaml train.max_steps=1"
    result = run_bash(f'bash "{ROOT}/scripts/{script}" {arguments}', cwd=tmp_path, SF_MLLM_PYTHON=sys.executable)
    assert result.returncode == 2
    assert "Config file 'nothing.yaml' does not exist" in result.stderr and result.stderr.count("\n") == 1


def test_quickstart_answers_from_any_directory(tmp_path):
    result = run_bash(f'bash "{ROOT}/scripts/quickstart.sh"', cwd=tmp_path, SF_MLLM_PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert list(lines) == ["image", "question", "answer", "time"]
    assert lines["answer"].strip() and Path(lines["image"].strip()).is_file()


@pytest.mark.parametrize("script", ["quickstart.sh", "check.sh"])
def test_an_argument_that_means_nothing_is_refused(tmp_path, script):
    result = run_bash(f'bash "{ROOT}/scripts/{script}" photo.jpg', cwd=tmp_path, SF_MLLM_PYTHON=sys.executable)
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: {script} takes no arguments, got: photo.jpg"
