#!/bin/bash
# What a release must do under a Python: builds the wheel, installs it into a fresh environment, imports it
# outside of the checkout and trains three steps on a CPU by the wheel's door.
#
#   bash scripts/release_check.sh PYTHON [PYTHON...]     as python3.12 python3.13
#
# Each environment takes 5 GB in FOLDER (default: a new one under TMPDIR) and is removed at the end. TESTS=1 also
# runs tests/unit in it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || die "which Python? give one or more, as python3.12 python3.13"

folder=$(mktemp -d ${FOLDER:+-p "$FOLDER"})
trap 'rm -rf "$folder"' EXIT
git -C "$ROOT" archive HEAD | (mkdir "$folder/tree" && tar -x -C "$folder/tree") # setuptools builds inside of it
unset PYTHONPATH MEGATRON_MHC
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1

for base in "$@"; do
    base=$(command -v "$base") || die "$base: no such program"
    step "$("$base" --version): a fresh environment"
    "$base" -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install -qq --disable-pip-version-check build
    "$python" -m build --wheel --outdir "$folder/dist" "$folder/tree" >"$folder/build.log" 2>&1 ||
        { tail -n 20 "$folder/build.log"; die "the wheel was not built"; }
    wheel=("$folder"/dist/*.whl)
    "$python" -m pip install -qq --disable-pip-version-check -c "$ROOT/scripts/constraints.txt" "${wheel[0]}[train]"
    cd "$folder"
    "$python" -c 'import megatron_mhc as m, sys, torch; print(m.__version__, torch.__version__, sys.version)'
    step "three steps"
    # shellcheck disable=SC2046  # words
    "$python" -m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_mhc.testing.cpu \
        -m megatron_mhc.pretrain_gpt $(cat "$folder/tree/tests/unit/cpu_model.args") >"$folder/train.log" 2>&1 ||
        { tail -n 20 "$folder/train.log"; die "training failed"; }
    [ "$(grep -c 'lm loss: ' "$folder/train.log")" = 3 ] ||
        { tail -n 20 "$folder/train.log"; die "these are not three steps"; }
    grep -o 'lm loss: [^|]*' "$folder/train.log"
    if [ -n "${TESTS:-}" ]; then
        step "tests/unit"
        "$python" -m pip install -qq --disable-pip-version-check -c "$ROOT/scripts/constraints.txt" \
            "${wheel[0]}[train,dev]"
        (cd "$folder/tree" && "$python" -m pytest -q tests/unit)
    fi
    rm -rf "$folder/venv" "$folder/dist"
done
