#!/bin/bash
# Lint, types, layers and tests, in a venv that the first run makes.
#
#   bash scripts/test.sh [arguments of pytest, as -m slow]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

ensure_python train,dev,docs
export OMP_NUM_THREADS=1 # the tests start several processes of their own
export CUDA_VISIBLE_DEVICES= # and run on a CPU also where a GPU is; tests/gpu says how to run on that

step "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
step "clang-format"
git ls-files -z '*.cu' '*.cuh' '*.h' '*.cpp' |
    PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" xargs -0 clang-format --dry-run -Werror
step "mypy"
"$PYTHON" -m mypy
step "codespell"
"$PYTHON" -m codespell_lib
step "import-linter"
"$PYTHON" -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-cache
step "pytest"
# A test seldom keeps two cores busy: one runs on each core. MHC_PYTHON may lack pytest-xdist.
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(--numprocesses auto --maxprocesses 4 --dist worksteal)
fi
export MEGATRON_MHC_TEST_REPORT="$ROOT/build/support.json"
"$PYTHON" -m pytest ${workers[@]+"${workers[@]}"} "$@"
step "support matrix" # no row says more than this run shows
"$PYTHON" tests/support_runs.py "$MEGATRON_MHC_TEST_REPORT"
