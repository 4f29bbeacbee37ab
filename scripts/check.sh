#!/usr/bin/env bash
# Format, lint, types and import direction; each can fail.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
[ $# -eq 0 ] || sf_fail "check.sh takes no arguments, got: $*"
sf_python test

cd "$SF_ROOT"
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy sf_mllm
"$PYTHON" -m pytest tests/test_imports.py
