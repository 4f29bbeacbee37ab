# Sourced by the other scripts: which Python runs, with this project installed in it.
#
#   source ".../scripts/_env.sh"
#   sf_python [EXTRA]      sets PYTHON, and SF_ROOT to the repository root
#
# SF_MLLM_PYTHON=/path/to/python  is used as it is, nothing is installed; else
# an active virtual environment (VIRTUAL_ENV) or conda environment (CONDA_PREFIX) is used; else
# .venv in the repository root, made here from the first Python >= 3.10 on PATH.
# `pip install -e .[EXTRA]` runs only if this pyproject.toml was not installed there yet.

SF_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

sf_fail() {
  echo "error: $*" >&2
  exit 2
}

sf_is_supported() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

sf_make_venv() {
  local venv="$1" candidate base=""
  for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$candidate" >/dev/null 2>&1 && sf_is_supported "$candidate"; then
      base="$candidate"
      break
    fi
  done
  [ -n "$base" ] || sf_fail "No Python >= 3.10 found on PATH; install one from your package manager or python.org."
  echo "Making a virtual environment in $venv ($("$base" --version))" >&2
  if ! "$base" -m venv --clear "$venv" >&2; then
    rm -rf "$venv"
    sf_fail "$base cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt install python3-venv)."
  fi
}

sf_python() {
  local extra="${1:-}" prefix stamp key installed
  if [ -n "${SF_MLLM_PYTHON:-}" ]; then
    PYTHON="$(command -v "$SF_MLLM_PYTHON")" || sf_fail "SF_MLLM_PYTHON='$SF_MLLM_PYTHON' is not a program."
    sf_is_supported "$PYTHON" || sf_fail "SF_MLLM_PYTHON='$SF_MLLM_PYTHON' is not a Python >= 3.10."
    return
  fi

  prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [ -n "$prefix" ]; then
    PYTHON="$prefix/bin/python3"
    sf_is_supported "$PYTHON" || sf_fail "The active environment '$prefix' has no Python >= 3.10; deactivate it or make a newer one."
  else
    prefix="$SF_ROOT/.venv"
    PYTHON="$prefix/bin/python3"
    # An interrupted first run leaves an environment without pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || sf_make_venv "$prefix"
  fi

  # The stamp says which pyproject.toml was installed; the import says that it is still this checkout's package.
  stamp="$prefix/.sf_mllm_installed"
  key="$("$PYTHON" -I -c 'import hashlib, sys; print(sys.version_info[:3], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$SF_ROOT/pyproject.toml")"
  installed="$("$PYTHON" -I -c 'import os, sf_mllm; print(os.path.dirname(os.path.dirname(os.path.realpath(sf_mllm.__file__))))' 2>/dev/null || true)"
  if [ "$installed" != "$SF_ROOT" ]; then
    rm -f "$stamp" "$stamp".*
  elif [ "$(cat "$stamp${extra:+.$extra}" 2>/dev/null)" = "$key" ]; then
    return
  fi
  echo "Installing sf_mllm${extra:+[$extra]} and what it needs into $prefix (the first time PyTorch is downloaded: minutes)" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$SF_ROOT${extra:+[$extra]}" >&2 \
    || sf_fail "pip could not install the project into $prefix; its message is above."
  echo "$key" >"$stamp"
  [ -z "$extra" ] || echo "$key" >"$stamp.$extra"
}
