#!/bin/bash
# From a fresh machine to a small GPT with mHC and the same GPT without it, in minutes: finds a Python,
# makes .venv, installs, trains both on the Python library's sources, plots. Arguments: see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_python train
exec "$PYTHON" "$ROOT/examples/quickstart/run.py" "$@"
