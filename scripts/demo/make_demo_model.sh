#!/usr/bin/env bash
# Makes a demo model as it ships with the project: teacher, decoder, encoder, chat model. One GPU; eval/results/demo_training.csv
# says how long each part took.
#
#   bash scripts/demo/make_demo_model.sh OUT
#
# OUT/release then holds what sf_mllm/demo_model holds. A step whose result is there is not done again.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/demo/make_demo_model.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd -P)"
source "$(dirname "${BASH_SOURCE[0]}")/../_env.sh"
sf_python
cd "$SF_ROOT"

run() { echo "+ python -m $*" >&2; "$PYTHON" -m "$@"; }

if [ ! -d "$out/clip" ]; then # the teacher is saved while it trains; only a finished one gets the name
  rm -rf "$out/clip.unfinished"
  run scripts.demo.train_clip --out "$out/clip.unfinished" --seconds 330 --log "$out/clip.jsonl"
  mv "$out/clip.unfinished" "$out/clip"
fi
[ -d "$out/decoder" ] || run scripts.demo.train_decoder --out "$out/decoder" --seconds 300
run sf_mllm.data.scenes "$out/scenes" --count 100000 --seed 1 --image-format bmp --workers "$(nproc)" # 15 GB
run sf_mllm.training.bootstrap configs/bootstrap/demo_model.yaml output_dir="$out/bootstrap" \
  teacher.model="local-dir:$out/clip" data.images="$out/scenes/images"
run sf_mllm.training.instruct configs/finetune/demo_model.yaml output_dir="$out/finetune" \
  encoder="$out/bootstrap/encoder" decoder="$out/decoder" \
  data.conversations="$out/scenes/instructions.json" data.image_root="$out/scenes/images"

rm -rf "$out/release"
mkdir "$out/release"
cp -r "$out/clip" "$out/decoder" "$out/release/"
cp -r "$out/finetune/model" "$out/release/sf_llava"
