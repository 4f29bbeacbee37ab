#!/usr/bin/env bash
# Makes an environment if none is active, then lets the shipped model answer a question about the shipped image.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
[ $# -eq 0 ] || sf_fail "quickstart.sh takes no arguments, got: $*"
sf_python

image="$SF_ROOT/sf_mllm/demo_model/example.png"
question="How many objects are there?"
echo "image:    $image"
echo "question: $question"
SECONDS=0
answer="$("$PYTHON" -m sf_mllm.cli --image "$image" --prompt "$question")"
echo "answer:   $answer"
echo "time:     $SECONDS s, start of Python and loading of the model included"
