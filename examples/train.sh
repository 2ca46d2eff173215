#!/bin/bash
# Train a recipe with torchrun: the paper's 3b, 9b, 27b and 3b-1t, or llama-1b; as vanilla, hc or mhc.
#
#   DATA="1.0 /data/corpus_text_document" TOKENIZER=/data/tokenizer OUT=runs/3b \
#       bash examples/train.sh 3b mhc [more Megatron or --mhc-* arguments]
#
# On several nodes run it on each, with NODES, NODE_RANK, MASTER_ADDR and the same OUT on a shared disk.
# Other variables: recipe.sh. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
recipe "${1:?which model: 3b, 9b, 27b, 3b-1t or llama-1b}" "${2:?which form: vanilla, hc or mhc}"
shift 2

COMMAND=(
    torchrun --nproc-per-node "${GPUS_PER_NODE:-8}" --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}"
    --log-dir "$OUT/logs" --tee 3 # a file for each rank beside the terminal
    -m megatron_mhc.pretrain_gpt "${ARGUMENTS[@]}" "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${COMMAND[@]}"
    echo
else
    exec "${COMMAND[@]}"
fi
