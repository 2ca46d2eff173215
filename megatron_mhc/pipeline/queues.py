"""Why CUDA_DEVICE_MAX_CONNECTIONS=1 is refused over NCCL."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from megatron_mhc.config import flag
from megatron_mhc.pipeline import loading

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def check_queues(schedule: str, pp_group: Any) -> None:
    """Refuse one hardware queue for all streams where messages pend on the device.

    What waits in a queue, for an event or for what its own stream did before, holds up all that the host
    issued after it, on whatever stream. A receive waits so for the one posted before it on its channel. Where
    that one's message follows from compute or from a send further back in the queue, and the neighbour's
    queue stands alike, both wait for ever. Two H100s did, twice of twice, before any message had come (PP2 x
    VPP2, fused, split; never with 32), and so do that job's programs in a model of such queues
    (tests/unit/test_pipeline_queues.py). Unset means 8 queues.

    Megatron's arguments.py demands 1 under TP > 1 or CP > 1 on Hopper and before, unless FSDP or
    --overlap-moe-expert-parallel-comm is on: its own schedule is what remains there.

    Args:
        schedule: --mhc-pipeline-schedule.
        pp_group: the pipeline's process group; None where there is none yet.

    Raises:
        ValueError: naming the flag, the value found and the remedy.
    """
    if pp_group is not None and loading.pends_on_device(dist.get_backend(pp_group)):
        check_variable(schedule)


def check_variable(schedule: str) -> None:
    """`check_queues` of a pipeline whose messages pend on the device."""
    if (value := os.environ.get(VARIABLE, "")).strip() == "1":
        name = flag("pipeline_schedule")
        raise ValueError(
            f"{name} {schedule} over NCCL with {VARIABLE}={value}: all streams then share one hardware "
            "queue, where a receive that was posted ahead can hold up what its message follows from, and the "
            f"step would hang; put `export {VARIABLE}=32` into the launch script, or use {name} megatron "
            "(under TP > 1 or CP > 1 on Hopper and before, where Megatron demands 1, there is no other)"
        )
