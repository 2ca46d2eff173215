# Sourced by the *_door.sh examples: one small GPT (100M parameters) on mock data, on $GPUS GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/help.sh"
GPUS=${GPUS:-1}
MODEL=(
    --num-layers 12 --hidden-size 768 --num-attention-heads 12
    --seq-length 1024 --max-position-embeddings 1024 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 4 --global-batch-size $((8 * GPUS)) --train-iters 50
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 5
    --mock-data --tokenizer-type NullTokenizer --vocab-size 8192 --split 90,10,0
    --no-create-attention-mask-in-dataloader
    --bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion # the fusion needs apex
    --log-interval 1 --eval-interval 50 --eval-iters 2
)
