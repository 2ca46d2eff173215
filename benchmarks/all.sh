#!/bin/bash
# Makes every number of the docs on the GPUs of this machine, in pieces of at most ten minutes.
#
#   bash benchmarks/all.sh --out runs/benchmarks [--only a,b] [--budget-minutes 9] [--retry] [--list]
#   python -m benchmarks.report runs/benchmarks
#
# A piece writes OUT/<piece>.json and is skipped where that is there; one that was cut goes on behind the row
# that was running. --budget-minutes begins no piece that is expected to take longer than what is left, and
# cuts at the end: give the same command again for the rest. --retry runs again what failed. A
# piece that fails does not end the others: its error is in its JSON, and the exit status is 1 (2: pieces are
# left). Pieces that need more GPUs than there are are left out. PYTHON names the interpreter; MHC_COMMIT the
# commit, where there is no git.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0
PYTHON=${PYTHON:-python3}

# piece, GPUs, expected minutes, command; {out} is its JSON, {folder} a folder of its own
PIECES=$(cat <<'LIST'
step_b1          1 2 -m benchmarks.step --out {out} --logs {folder} --batches 1 --forms mhc
step_b2          1 2 -m benchmarks.step --out {out} --logs {folder} --batches 2 --forms mhc
step_b4          1 3 -m benchmarks.step --out {out} --logs {folder} --batches 4 --forms mhc --together 1
step_graphs_b1   1 2 -m benchmarks.step --out {out} --logs {folder} --batches 1 --forms mhc --graphs full_iteration
step_local_b1    1 2 -m benchmarks.step --out {out} --logs {folder} --batches 1 --forms mhc --graphs local
step_te_b1       1 2 -m benchmarks.step --out {out} --logs {folder} --batches 1 --forms mhc --graphs transformer_engine
step_graphs_b2   1 2 -m benchmarks.step --out {out} --logs {folder} --batches 2 --forms mhc --graphs full_iteration
step_graphs_b4   1 3 -m benchmarks.step --out {out} --logs {folder} --batches 4 --forms mhc --graphs full_iteration --together 2
step_auto_b1     1 2 -m benchmarks.step --out {out} --logs {folder} --batches 1 --forms mhc/auto
step_auto_b4     1 2 -m benchmarks.step --out {out} --logs {folder} --batches 4 --forms mhc/auto --together 2
step_3b_b1       1 6 -m benchmarks.step --out {out} --logs {folder} --model 3b --batches 1 --together 2
step_3b_b4       1 7 -m benchmarks.step --out {out} --logs {folder} --model 3b --batches 4 --together 1 --forms mhc --warm-up 2 --turns 2 --steps 2
step_3b_auto_b4  1 7 -m benchmarks.step --out {out} --logs {folder} --model 3b --batches 4 --together 1 --forms mhc/auto --warm-up 2 --turns 2 --steps 2
step_tp2_b1      2 3 -m benchmarks.step --out {out} --logs {folder} --batches 1 --tp 2 --forms mhc
step_tp2_b2      2 3 -m benchmarks.step --out {out} --logs {folder} --batches 2 --tp 2 --forms mhc
ops_2560         1 2 -m benchmarks.kernels --out {out} --only ops --shapes 4096x2560
ops_4096         1 3 -m benchmarks.kernels --out {out} --only ops --shapes 8192x4096
ops_7168         1 3 -m benchmarks.kernels --out {out} --only ops --shapes 4096x7168
forms_2560       1 3 -m benchmarks.kernels --out {out} --only forms --shapes 4096x2560
forms_4096       1 4 -m benchmarks.kernels --out {out} --only forms --shapes 8192x4096
forms_7168       1 4 -m benchmarks.kernels --out {out} --only forms --shapes 4096x7168
norms_2560       1 3 -m benchmarks.kernels --out {out} --only norms --shapes 4096x2560
norms_4096       1 4 -m benchmarks.kernels --out {out} --only norms --shapes 8192x4096
norms_7168       1 4 -m benchmarks.kernels --out {out} --only norms --shapes 4096x7168
rivals_2560      1 5 -m benchmarks.kernels --out {out} --only rivals --shapes 4096x2560
rivals_4096      1 6 -m benchmarks.kernels --out {out} --only rivals --shapes 8192x4096
errors           1 5 -m benchmarks.kernels --out {out} --only errors --shapes 4096x2560
stages           1 2 -m benchmarks.kernels --out {out} --only stages
memory_2560      1 3 -m benchmarks.memory --out {out} --widths 2560
memory_4096      1 4 -m benchmarks.memory --out {out} --widths 4096
decode           1 3 -m benchmarks.decode --out {out}
diagnostics      1 4 -m benchmarks.diagnostics --out {out} --logs {folder}
nvlink_2560      2 6 -m benchmarks.multi_gpu --out {out} --logs {folder} --together 4
nvlink_4096      2 7 -m benchmarks.multi_gpu --out {out} --logs {folder} --together 4 --widths 4096 --micro-batch 1
nvlink_2560_n1   2 6 -m benchmarks.multi_gpu --out {out} --logs {folder} --together 4 --streams 1
sockets_2560     2 8 -m benchmarks.multi_gpu --out {out} --logs {folder} --together 4 --sockets --micro-batches 4 --turns 2
sockets_4096     2 9 -m benchmarks.multi_gpu --out {out} --logs {folder} --together 4 --sockets --micro-batches 4 --turns 2 --widths 4096 --micro-batch 1
experts          2 3 -m benchmarks.multi_gpu --out {out} --logs {folder} --layout ep
parity           2 6 -m pytest -q -p no:cacheprovider tests/multi_gpu/test_parity.py::test_two_ranks_compute_what_one_does
parity_float64   2 5 -m pytest -q -p no:cacheprovider tests/multi_gpu/test_parity.py::test_two_ranks_compute_what_one_does_in_float64
curves           2 8 -m pytest -q -p no:cacheprovider tests/multi_gpu/test_curves.py
resume           2 8 -m pytest -q -p no:cacheprovider tests/multi_gpu/test_resume.py
recompute_bits   1 3 -m pytest -q -p no:cacheprovider tests/gpu/test_recompute_bits.py
many_lengths     1 2 -m pytest -q -rA -p no:cacheprovider tests/gpu/test_memory.py
graphs_memory    1 2 -m pytest -q -rA -p no:cacheprovider tests/gpu/test_te_graphs.py -k costs
graphs_bits      1 5 -m pytest -q -rA -p no:cacheprovider tests/gpu/test_te_graphs.py -k graphed_equals
graphs_tp_pp     2 3 -m pytest -q -rA -p no:cacheprovider tests/gpu/test_te_graphs.py -k two_gpus
training         1 9 -m pytest -q -rA -n 8 -p no:cacheprovider tests/gpu/test_training.py
losses           1 6 scripts/gpu_check.py --out {folder} --jobs 4
stability        1 9 examples/stability/run.py --out {folder} --steps 400 --batch 8 --lr 1e-2 --seeds 1,2,3 --jobs 9 --log-interval 20 --save-interval 0
LIST
)

die() { echo "all.sh: $*" >&2; exit 2; }

out= only= budget=100000 retry= list=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out FOLDER}; shift ;;
        --only) only=${2:?--only a,b}; shift ;;
        --budget-minutes) budget=${2:?--budget-minutes N}; shift ;;
        --retry) retry=1 ;;
        --list) list=1 ;;
        *) die "no option $1: there are --out, --only, --budget-minutes, --retry, --list" ;;
    esac
    shift
done
if [ -n "$list" ]; then
    printf '%-16s %5s %8s  %s\n' piece GPUs minutes command
    while read -r piece gpus minutes command; do
        printf '%-16s %5s %8s  %s\n' "$piece" "$gpus" "$minutes" "$command"
    done <<<"$PIECES"
    exit 0
fi
[ -n "$out" ] || die "give --out FOLDER"
case $budget in *[!0-9]* | "") die "--budget-minutes $budget: a whole number of minutes" ;; esac
for name in ${only//,/ }; do
    grep -q "^$name " <<<"$PIECES" || die "--only $name: no such piece, see --list"
done
mkdir -p "$out/logs" || die "--out $out: cannot be made"
out=$(cd "$out" && pwd)
available=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c .)}
began=$SECONDS failed=() left=()

while read -r piece gpus minutes command; do
    [ -z "$only" ] || [[ ",$only," = *",$piece,"* ]] || continue
    [ "$gpus" -le "$available" ] || { echo "== $piece: needs $gpus GPUs, here are $available"; continue; }
    done_=$out/$piece.json partial=$out/$piece.partial.json folder=$out/logs/$piece
    if [ -f "$done_" ]; then
        { [ -n "$retry" ] && grep -q '"failed"' "$done_"; } || continue
        "$PYTHON" -m benchmarks.report --reopen "$done_" "$partial"
    fi
    seconds=$((budget * 60 - (SECONDS - began)))
    if [ $((minutes * 60)) -gt "$seconds" ]; then left+=("$piece"); continue; fi
    [ "$seconds" -lt 600 ] || seconds=600
    mkdir -p "$folder"
    echo "== $piece: $minutes minutes expected"
    filled=${command//\{out\}/$partial} filled=${filled//\{folder\}/$folder}
    from=$SECONDS
    gpu_tests=
    case $command in *tests/multi_gpu*) gpu_tests=nccl ;; *tests/gpu*) gpu_tests=1 ;; esac
    # shellcheck disable=SC2086  # words
    MEGATRON_MHC_GPU_TESTS=$gpu_tests BENCHMARK_REPORT=$partial \
        timeout --signal INT --kill-after 60 "$seconds" "$PYTHON" $filled >>"$folder/output.log" 2>&1 </dev/null
    status=$?
    tail -n 40 "$folder/output.log" | cut -c 1-400
    case $piece in # what has a report of its own
        losses) "$PYTHON" -m benchmarks.report --adopt "$folder/results.json" "$partial" ;;
        stability) "$PYTHON" -m benchmarks.report --adopt "$folder/figures/summary.json" "$partial" ;;
    esac
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        echo "== $piece: cut after $((SECONDS - from)) s; the same command goes on with it"
        left+=("$piece")
        continue
    fi
    [ "$status" = 0 ] || failed+=("$piece")
    # What ended outside of its rows has no report, or one that does not say so.
    "$PYTHON" -m benchmarks.report --close "$partial" "$piece" "$status" "$((SECONDS - from))" "$folder/output.log" &&
        mv "$partial" "$done_"
    echo "== $piece: exit $status after $((SECONDS - from)) s"
done <<<"$PIECES"

[ ${#failed[@]} = 0 ] || echo "failed: ${failed[*]}"
[ ${#left[@]} = 0 ] || echo "left: ${left[*]}"
[ ${#failed[@]} = 0 ] || exit 1
[ ${#left[@]} = 0 ] || exit 2
