#!/bin/bash
# From a fresh machine to a small GPT with mHC and the same GPT without it, in minutes: finds a Python,
# makes .venv, installs, trains both on the Python library's sources, plots, exports the one with mHC for
# transformers and samples a line from it.
#
#   bash scripts/quickstart.sh [--steps N] [--out FOLDER] [--cpu]
#
#   --steps N      training steps of each model (default: 240 on a CPU, 1000 on a GPU)
#   --out FOLDER   of the results (default: runs/quickstart in the checkout)
#   --cpu          train on the CPU even where a GPU is
#
# MHC_PYTHON and MHC_VENV choose the interpreter and the environment, see scripts/common.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_python train,export
exec "$PYTHON" "$ROOT/examples/quickstart/run.py" "$@"
