"""Why CUDA_DEVICE_MAX_CONNECTIONS=1 is refused over NCCL, and not where messages are pushed."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.pipeline import links, loading

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def check_queues(mhc: MHCConfig, pp_group: Any, say: bool = True) -> None:
    """Refuse one hardware queue for all streams where receives pend on the device.

    One queue has head-of-line blocking: an operation that waits holds up everything that the host issued
    later, on any stream. A posted receive waits for the receive in front of it on its channel. If the message
    of that one depends on compute or on a send further back in the queue, and the neighbour's queue looks the
    same, the wait is circular. tests/unit/test_pipeline_queues.py runs programs in a model of such queues.
    Unset means 8 queues. A pushed message waits where the program waits, and `check.check_in_order` proves
    that one queue is enough.

    Megatron's arguments.py demands 1 under TP > 1 or CP > 1 on Hopper and older GPUs, unless FSDP or
    --overlap-moe-expert-parallel-comm is on. Over NCCL only Megatron's own schedule runs there.

    Args:
        mhc: --mhc-pipeline-schedule and --mhc-pipeline-transport.
        pp_group: the pipeline's process group; None where there is none yet. Every rank of the world makes
            the first call with one, see `links.choose`.
        say: whether the log gets how messages travel.

    Raises:
        ValueError: naming the flag, the value found and the remedy.
    """
    if pp_group is None:
        return
    choice = links.choose(pp_group, mhc, say)
    if not choice.pushes and loading.pends_on_device(dist.get_backend(pp_group)):
        check_variable(mhc.pipeline_schedule, choice.why)


def check_variable(schedule: str, why: str) -> None:
    """`check_queues` of a pipeline whose messages pend on the device; `why` they are not pushed."""
    if (value := os.environ.get(VARIABLE, "")).strip() == "1":
        name = flag("pipeline_schedule")
        raise ValueError(
            f"{name} {schedule} over NCCL ({why}) with {VARIABLE}={value}: all streams then share one "
            "hardware queue, where a receive that was posted ahead can hold up what its message follows "
            f"from, and the step would hang; put `export {VARIABLE}=32` into the launch script, or use "
            f"{name} megatron (under TP > 1 or CP > 1 on Hopper and older GPUs, where Megatron demands 1, "
            "there is no other over NCCL)"
        )
