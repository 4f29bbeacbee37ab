#!/usr/bin/env bash
# Stage one: make a SparseFormer encoder from a CLIP ViT.
# Usage: bash scripts/bootstrap_clip.sh [CONFIG.yaml] [key=value ...]
# Without a configuration it runs configs/bootstrap/demo.yaml: a CPU, a few minutes. The same command resumes a run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
sf_python

config="$SF_ROOT/configs/bootstrap/demo.yaml"
case "${1:-}" in
  *=* | "" | -*) ;;
  *) config="$1"; shift ;;
esac
exec "$PYTHON" -m sf_mllm.training.bootstrap "$config" "$@"
