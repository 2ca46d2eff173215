#!/bin/bash
# Door 2: your own Megatron-LM launch script, unmodified, with real --mhc-* flags.
#   MEGATRON_LM=/path/to/Megatron-LM GPUS=1 bash examples/launch_door.sh [more Megatron or --mhc-* arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"
: "${MEGATRON_LM:?the path of a Megatron-LM checkout, tag core_v0.19.0}"

export CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun --nproc-per-node "$GPUS" -m megatron_mhc.launch "$MEGATRON_LM/pretrain_gpt.py" "${MODEL[@]}" \
    --mhc-num-residual-streams 4 "$@"
