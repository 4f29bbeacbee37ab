#!/usr/bin/env bash
# Stage two: join an encoder and a language model, train projector and LoRA on conversations about images.
#
#   bash scripts/finetune_llava.sh [CONFIG.yaml] [key=value ...]
#
# Without a config: configs/finetune/demo.yaml, a few minutes on a CPU. The same command again resumes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
sf_python

config="$SF_ROOT/configs/finetune/demo.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
  config="$1"
  shift
fi
exec "$PYTHON" -m sf_mllm.training.instruct "$config" "$@"
