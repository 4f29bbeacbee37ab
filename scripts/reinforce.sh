#!/usr/bin/env bash
# Ask the teacher of stage one once about fixed crops of every image, and store what it says.
#
#   bash scripts/reinforce.sh [CONFIG.yaml] store.path=DIRECTORY [key=value ...]
#   bash scripts/bootstrap_clip.sh [CONFIG.yaml] store.path=DIRECTORY [key=value ...]
#
# Without a config: configs/bootstrap/demo.yaml. The same command again goes on after an interruption.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
sf_python

config="$SF_ROOT/configs/bootstrap/demo.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
  config="$1"
  shift
fi
exec "$PYTHON" -m sf_mllm.training.reinforce "$config" "$@"
