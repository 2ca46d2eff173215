#!/bin/bash
# Pretrain one of the mHC paper's models (arXiv 2512.24880): DeepSeek-V3-style MoE with MLA.
#
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node0 DATA="1.0 /data/corpus_text_document" TOKENIZER=/data/tokenizer \
#       bash train_paper.sh 27b [more Megatron or --mhc-* arguments, e.g. --no-mhc for the baseline]
#
#   DATA       Megatron's --data-path: a blend of dataset prefixes made by its tools/preprocess_data.py
#   TOKENIZER  a Hugging Face tokenizer folder; the paper's has 129280 tokens
#   OUT        folder of checkpoints and logs         PP, EP, TP, MBS   parallel layout, micro-batch
#   DRY_RUN=1  print the command instead of running it
#
# The paper multiplies the learning rate by 0.316 at 80 % and by 0.1 at 90 % of the steps. Megatron 0.19.2
# has no step schedule and refuses a changed --lr on resume, so this falls from 1 to 0.1 over the last
# 20 %. The paper does not state the width of the leading dense layer: 8 experts' width, as much as a
# token sees elsewhere, reproduces its parameter counts.
set -euo pipefail

case "${1:?which model: 3b, 9b, 27b or 3b-1t}" in
    #        layers hidden heads experts expert_ffn batch steps lr min_lr
    3b)    set -- 12 1280 16 64  896  320  30000 8.6e-4 8.6e-5 "${@:2}"; : "${PP:=1}" "${EP:=8}" ;;
    3b-1t) set -- 12 1280 16 64  896 2560 100000 9.0e-4 9.0e-5 "${@:2}"; : "${PP:=1}" "${EP:=8}" ;;
    9b)    set -- 18 1920 24 64 1280  512  50000 5.9e-4 5.9e-5 "${@:2}"; : "${PP:=1}" "${EP:=8}" ;;
    27b)   set -- 30 2560 32 72 1536 1280  50000 4.0e-4 4.0e-5 "${@:2}"; : "${PP:=2}" "${EP:=8}" ;;
    *) echo "$0: no model '$1': give 3b, 9b, 27b or 3b-1t" >&2; exit 2 ;;
esac
LAYERS=$1 HIDDEN=$2 HEADS=$3 EXPERTS=$4 EXPERT_FFN=$5 BATCH=$6 STEPS=$7 LR=$8 MIN_LR=$9
shift 9

: "${DATA:?the --data-path blend}" "${TOKENIZER:?a Hugging Face tokenizer folder}"
OUT=${OUT:-runs/paper}
TP=${TP:-1} MBS=${MBS:-1}
ACTIVE_FFN=$((8 * EXPERT_FFN)) # 6 routed and 2 shared experts

COMMAND=(
    torchrun --nproc-per-node "${GPUS_PER_NODE:-8}" --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}"
    -m megatron_mhc.pretrain_gpt

    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --transformer-impl transformer_engine --bf16 --attention-backend auto

    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$ACTIVE_FFN"
    --num-attention-heads "$HEADS" --seq-length 4096 --max-position-embeddings 4096
    --normalization RMSNorm --norm-epsilon 1e-20 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0

    # The fused rotary kernel of MLA is for YaRN alone.
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --v-head-dim 128 --qk-layernorm
    --qk-pos-emb-head-dim 64 --position-embedding-type rope --rope-type rope --rotary-base 10000
    --no-rope-fusion

    --num-experts "$EXPERTS" --moe-ffn-hidden-size "$EXPERT_FFN" --moe-router-topk 6
    --moe-shared-expert-intermediate-size $((2 * EXPERT_FFN))
    --moe-layer-freq "([0]+[1]*$((LAYERS - 1)))"
    --moe-router-load-balancing-type none --moe-router-enable-expert-bias
    --moe-router-score-function sigmoid --moe-router-dtype fp32 --moe-router-bias-update-rate 1e-3
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm

    --micro-batch-size "$MBS" --global-batch-size "$BATCH" --train-iters "$STEPS"
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-20 --weight-decay 0.1 --clip-grad 1.0
    --lr "$LR" --min-lr "$MIN_LR" --lr-warmup-iters 2000
    --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters $((STEPS / 5))

    --no-create-attention-mask-in-dataloader
    --data-path $DATA --split 99,1,0 --data-cache-path "$OUT/cache"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
    --save "$OUT/checkpoint" --load "$OUT/checkpoint" --save-interval 1000
    --tensorboard-dir "$OUT/tensorboard" --log-interval 10 --eval-interval 1000 --eval-iters 10
)
[ "$TP" = 1 ] || COMMAND+=(--sequence-parallel)
# The spec's defaults are the paper's: 4 streams, 20 Sinkhorn iterations, alpha 0.01.
COMMAND+=("$@")

if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${COMMAND[@]}"
    echo
else
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    exec "${COMMAND[@]}"
fi
