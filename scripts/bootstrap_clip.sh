#!/usr/bin/env bash
# Stage one: make a SparseFormer encoder from a CLIP ViT.
#
#   bash scripts/bootstrap_clip.sh [CONFIG.yaml] [key=value ...] [--report]
#
# Without a config: configs/bootstrap/demo.yaml, a few minutes on a CPU. The same command again resumes. With --report
# the run folder gets report.html: curves, zero-shot scores of student and teacher, where the encoder looks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
sf_python

config="$SF_ROOT/configs/bootstrap/demo.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* && "$1" != -* ]]; then
  config="$1"
  shift
fi
exec "$PYTHON" -m sf_mllm.training.bootstrap "$config" "$@"
