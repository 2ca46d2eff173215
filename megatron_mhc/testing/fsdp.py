"""Megatron-FSDP and torch's FSDP2 on a CPU, after `cpu.install()`; asked for by processes that run them.

Their collectives, buckets and hooks are the real ones. `--no-gradient-reduce-div-fusion` keeps Megatron-FSDP
from a reduction that NCCL alone has; it knows no float64.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megatron_mhc.testing.parameters import global_parameters

_from_group, _all_gather = DeviceMesh.from_group, dist.all_gather_into_tensor


class _Done:
    def wait(self) -> None:
        pass


def install() -> None:
    """Make the meshes of "cuda" that Megatron asks for those of the CPU; a second call does nothing."""

    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return _from_group(group, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    @contextmanager
    def one_by_one(*_: Any, **__: Any) -> Iterator[_Done]:
        yield _Done()  # all_gather, the only one that is not waited for, has then ended

    def all_gather(*args: Any, async_op: bool = False, **kwargs: Any) -> _Done:
        _all_gather(*args, **kwargs)
        return _Done()

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"  # Megatron's arguments refuse 1, which `cpu` sets
    DeviceMesh.from_group = staticmethod(on_cpu)
    # gloo's coalesced all-gather takes tensors of one dtype, and mixes the bytes of several.
    param_and_grad_buffer._coalescing_manager = one_by_one
    dist.all_gather_into_tensor = all_gather
    torch.cuda.current_device = lambda: 0  # it goes into the name of a device


def full_gradients(chunks: list[Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every parameter of model chunks in an FSDP: name in the whole model, the parameter as the model
    reads it, and its gradient, put together from the shards of its data-parallel group.
    """
    as_built = {}
    for chunk in chunks:
        as_built |= getattr(chunk.module, "raw_param", {})  # Megatron-FSDP's, without wrappers' prefixes
    for (name, parameter), (local, _) in zip(global_parameters(chunks), _local(chunks), strict=True):
        raw = as_built.get(local, parameter)
        yield name, raw, _full(parameter.grad, raw)


def _local(chunks: list[Any]) -> Iterator[tuple[str, Tensor]]:
    for chunk in chunks:
        core = getattr(chunk.module, "module", chunk.module)  # what Megatron-FSDP calls its module
        yield from core.named_parameters()


def _full(sharded: Any, parameter: Any) -> Tensor:
    expert = not getattr(parameter, "allreduce", True)
    group = ps.get_expert_data_parallel_group() if expert else ps.get_data_parallel_group(True)
    # A rank may have no part of it.
    mine = torch.zeros(0) if sharded is None else sharded.to_local().detach().flatten()
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return torch.cat([part for part in everyone if part.numel()]).view(parameter.shape)
