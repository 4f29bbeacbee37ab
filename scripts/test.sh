#!/usr/bin/env bash
# Runs the tests on all cores: bash scripts/test.sh [pytest arguments], of which -n 0 means in a single process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
sf_python test

cd "$SF_ROOT"
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
