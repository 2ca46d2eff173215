# Sourced by train.sh and slurm.sh: `recipe MODEL FORM` puts a recipe's command line into ARGUMENTS.
#
# Variables:
#   DATA       --data-path: a blend of prefixes made by Megatron-LM's tools/preprocess_data.py; or `mock`
#   TOKENIZER  a Hugging Face tokenizer folder (the paper's has 129280 tokens); not for mock data
#   OUT        folder of checkpoints and logs, seen by all nodes
#   TP PP VPP EP MBS   parallel layout and micro-batch; VPP counts the chunks of a pipeline rank
#   WITH       further argument files, by spaces: fp8, deepep
#   STEPS      optimizer steps, if not the recipe's; the schedule of the learning rate scales with it
RECIPES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/recipes

# Of the environment; what is set stays.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # more for the plugin's pipeline schedules
export NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0} # for --cuda-graph-impl beside segments that grow
# Segments that grow: experts' tokens differ from step to step, and blocks of fixed size would leave holes.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# words FILE: the file's arguments, without comments
words() { sed 's/#.*//' "$RECIPES/$1.args" | tr -s ' \n' '\n' | sed '/^$/d'; }

recipe() {
    local model=$1 form=$2 family=paper vocabulary=129280
    case $model in
        3b)       LR=8.6e-4 ; : "${STEPS:=30000}"  "${PP:=1}" "${EP:=8}" ;;
        3b-1t)    LR=9.0e-4 ; : "${STEPS:=100000}" "${PP:=1}" "${EP:=8}" ;;
        9b)       LR=5.9e-4 ; : "${STEPS:=50000}"  "${PP:=1}" "${EP:=8}" ;;
        27b)      LR=4.0e-4 ; : "${STEPS:=50000}"  "${PP:=2}" "${VPP:=3}" "${EP:=8}" ;;
        llama-1b) LR=4.0e-4 family= vocabulary=128256 ; : "${STEPS:=20000}" "${PP:=1}" "${EP:=1}" ;;
        *) echo "no model '$model': give 3b, 3b-1t, 9b, 27b or llama-1b" >&2; return 2 ;;
    esac
    case $form in
        vanilla | hc | mhc) ;;
        *) echo "no form '$form': give vanilla, hc or mhc" >&2; return 2 ;;
    esac
    local extra
    for extra in ${WITH:-}; do
        case $extra in
            deepep) [ "$family" = paper ] || { echo "WITH=deepep: $model has no experts" >&2; return 2; } ;;
            fp8) ;;
            *) echo "WITH has no '$extra': give fp8, deepep or both" >&2; return 2 ;;
        esac
    done
    : "${DATA:?the --data-path blend, or mock}"
    OUT=${OUT:-runs/$model-$form}
    TP=${TP:-1} VPP=${VPP:-1} MBS=${MBS:-1}

    ARGUMENTS=()
    local file word
    for file in $family "$model" "$form" ${WITH:-}; do
        while IFS= read -r word; do ARGUMENTS+=("$word"); done < <(words "$file")
    done
    if [[ $family = paper && " ${WITH:-} " = *" fp8 "* ]]; then
        ARGUMENTS+=(--moe-router-padding-for-quantization) # FP8 GEMMs want experts' tokens in sixteens
    fi
    ARGUMENTS+=(
        # The paper multiplies the rate by 0.316 at 80 % and by 0.1 at 90 % of the steps. Megatron 0.19.2 has no
        # such schedule, and its distributed optimizer knows parameter groups by their --lr, which a resumed
        # run therefore cannot change: the rate falls linearly to 0.1x over the last 20 %.
        --train-iters "$STEPS" --lr "$LR" --min-lr "$(awk "BEGIN { printf \"%.6g\", $LR / 10 }")"
        --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters $((STEPS / 5))
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
        --expert-model-parallel-size "$EP" --micro-batch-size "$MBS"
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --transformer-impl transformer_engine --bf16 --attention-backend auto
        --cross-entropy-loss-fusion --cross-entropy-fusion-impl native # Megatron 0.19.2 refuses `te`
        --manual-gc --manual-gc-interval 100 # all ranks at the same step: one that collects alone holds up all
        --distributed-timeout-minutes 30 # for the first step's compilation and for checkpoints on a slow disk
        --no-create-attention-mask-in-dataloader --split 99,1,0
        --ckpt-format torch_dist --save "$OUT/checkpoint" --load "$OUT/checkpoint" --save-interval 1000
        --exit-signal-handler # SIGTERM saves a checkpoint before the run ends
        --tensorboard-dir "$OUT/tensorboard" --log-interval 10 --log-throughput
        --eval-interval 1000 --eval-iters 10
    )
    [ "$EP" = 1 ] || ARGUMENTS+=(--expert-tensor-parallel-size 1)
    [ "$TP" = 1 ] || ARGUMENTS+=(--sequence-parallel)
    [ "$VPP" = 1 ] || ARGUMENTS+=(--num-virtual-stages-per-pipeline-rank "$VPP")
    if [ "$DATA" = mock ]; then
        ARGUMENTS+=(--mock-data --tokenizer-type NullTokenizer --vocab-size $((vocabulary - 1)))
    else
        local blend
        read -ra blend <<<"$DATA"
        ARGUMENTS+=(--data-path "${blend[@]}" --data-cache-path "$OUT/cache"
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:?a tokenizer folder}")
    fi
}

# The last step that was saved; 0 before the first.
last_step() { cat "$OUT/checkpoint/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }
