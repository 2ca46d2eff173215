# Sourced by the *.sbatch files, on the first node: one task for each GPU, checkpoint and requeue on SIGTERM.
#
#   run_on_slurm MODEL FORM [arguments]
#
# Variables beside those of recipe.sh:
#   CONTAINER  an image for pyxis (srun --container-image); MOUNTS adds to its --container-mounts
#   VENV       a virtual environment on a shared disk, activated where there is no container
#
# Tasks are started by srun and not by torchrun, so that SIGTERM reaches Megatron itself, which saves a
# checkpoint at the end of its step. It comes from `#SBATCH --signal=B:TERM@600`, ten minutes before the time
# limit, or from a preemption; the job is then put back into the queue and goes on from the checkpoint.
source "$SLURM_SUBMIT_DIR/examples/recipe.sh"

# InfiniBand. NCCL finds the adapters, the nearest to each GPU, and GPUDirect RDMA by itself, and sbatch hands on
# what you set. NCCL_DEBUG=INFO prints what it found: look for "NET/IB" and "GDRDMA".
#   NCCL_IB_TIMEOUT=22              an adapter waits 4 us x 2^22 = 17 s for an acknowledgement, and up to seven
#                                   times, so that a link may flap and come back without ending the job
# Only your cluster knows these; NCCL chooses where they are not set:
#   NCCL_IB_HCA=mlx5_0,mlx5_1       the adapters to use, where others serve storage or are down
#   NCCL_SOCKET_IFNAME=bond0        the Ethernet interface over which ranks find each other
#   NCCL_IB_GID_INDEX=3             on RoCE, the address to use, where NCCL's choice is not RoCE v2's
#   NCCL_IB_SL=1, NCCL_IB_TC=106    the service level and the traffic class that the fabric gives to training
#   NCCL_IB_QPS_PER_CONNECTION=2    queue pairs of a connection: more of them spread over a fabric's routes
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}

run_on_slurm() {
    local model=$1 form=$2 terminated= status=0
    shift 2
    recipe "$model" "$form"
    mkdir -p "$OUT/logs"
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${MASTER_ADDR%%$'\n'*} MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))

    # In the foreground bash would see a signal only when srun has ended.
    trap 'terminated=1; kill -TERM "$step" 2>/dev/null || true' TERM
    local launch step=
    launch=(srun --kill-on-bad-exit=1 --output "$OUT/logs/%x-%j-rank%t.log" --open-mode append)
    if [ -n "${CONTAINER:-}" ]; then
        launch+=(--container-image "$CONTAINER" --container-workdir "$SLURM_SUBMIT_DIR"
            --container-mounts "$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR${MOUNTS:+,$MOUNTS}")
    fi
    "${launch[@]}" bash -c '
        if [ -n "$0" ]; then source "$0/bin/activate"; fi
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
        exec python -m megatron_mhc.pretrain_gpt "$@"' \
        "$([ -n "${CONTAINER:-}" ] || echo "${VENV:-}")" "${ARGUMENTS[@]}" "$@" &
    step=$!
    [ -z "$terminated" ] || kill -TERM "$step" # it came while the step was starting
    while true; do # a signal ends a wait, not the step
        wait "$step" || true
        kill -0 "$step" 2>/dev/null || break
    done
    wait "$step" || status=$?
    if [ -n "$terminated" ] && [ "$(last_step)" -lt "$STEPS" ]; then
        scontrol requeue "$SLURM_JOB_ID"
        status=0
    fi
    return "$status"
}
