"""Megatron-FSDP and torch's FSDP2 on a CPU, after `cpu.install()`; asked for by processes that run them.

Their collectives, buckets and hooks are the real ones. `--no-gradient-reduce-div-fusion` keeps Megatron-FSDP
from a reduction that NCCL alone has; it knows no float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_from_group = DeviceMesh.from_group


def install() -> None:
    """Make the meshes of "cuda" that Megatron asks for those of the CPU; a second call does nothing."""

    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return _from_group(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    DeviceMesh.from_group = staticmethod(on_cpu)
    torch.cuda.current_device = lambda: 0  # it goes into the name of a device


def full(sharded: Any, shape: torch.Size) -> Tensor:
    """A parameter or gradient of this shape, put together from all ranks' shards; they lie one after another.

    Args:
        sharded: a DTensor; None of a rank that has no part of it.
    """
    mine = torch.zeros(0) if sharded is None else sharded.to_local().detach().flatten()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return torch.cat([part for part in everyone if part.numel()]).view(shape)
