#!/bin/bash
# Door 1: your own Megatron-LM launch script, unmodified, plus --spec. Options of mHC: MEGATRON_MHC.
#   MEGATRON_LM=/path/to/Megatron-LM GPUS=1 bash examples/spec_door.sh [more Megatron arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"
: "${MEGATRON_LM:?the path of a Megatron-LM checkout, tag core_v0.19.0}"

export CUDA_DEVICE_MAX_CONNECTIONS=1
export MEGATRON_MHC=${MEGATRON_MHC:-num_residual_streams=4} # key=value,... or the path of a .yaml file
exec torchrun --nproc-per-node "$GPUS" "$MEGATRON_LM/pretrain_gpt.py" "${MODEL[@]}" \
    --spec megatron_mhc.specs gpt_mhc_spec "$@"
