#!/bin/bash
# Door 3: no Megatron-LM checkout, only the megatron-core wheel.
#   GPUS=1 bash examples/wheel_door.sh [more Megatron or --mhc-* arguments; --no-mhc for the baseline]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

export CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun --nproc-per-node "$GPUS" -m megatron_mhc.pretrain_gpt "${MODEL[@]}" "$@"
