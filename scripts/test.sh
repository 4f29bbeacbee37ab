#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
sf_python test

cd "$SF_ROOT"
exec "$PYTHON" -m pytest "$@"
