"""Collectives that Megatron asks of NCCL, for gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def patch() -> None:
    """Give torch.distributed what Megatron asks of NCCL and gloo lacks."""
    barrier, all_to_all_single = dist.barrier, dist.all_to_all_single
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def any_barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group=group, async_op=async_op)  # device_ids are NCCL's

    def any_all_to_all(output: Tensor, input: Tensor, *splits: Any, **kwargs: Any) -> Any:
        # The MoE dispatcher makes lists of its splits only where they are CUDA tensors.
        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else value

        named = {key: plain(value) for key, value in kwargs.items()}
        return all_to_all_single(output, input, *map(plain, splits), **named)

    # gloo refuses unequal pieces, which MoE with expert tensor parallelism exchanges.
    def any_all_gather(tensors: Any, tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if async_op or len({t.shape for t in tensors}) == 1:
            return all_gather(tensors, tensor, group=group, async_op=async_op)
        for source, out in enumerate(tensors):
            piece = tensor.contiguous() if source == dist.get_rank(group) else torch.empty_like(out)
            dist.broadcast(piece, group=group, group_src=source)
            out.copy_(piece)

    def any_reduce_scatter(
        output: Tensor, tensors: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or len({t.shape for t in tensors}) == 1:
            return reduce_scatter(output, tensors, op=op, group=group, async_op=async_op)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, op=op, group=group)
        output.copy_(flat.split([t.numel() for t in tensors])[dist.get_rank(group)].view_as(output))

    dist.barrier = dist.distributed_c10d.barrier = any_barrier
    dist.all_to_all_single = any_all_to_all
    dist.all_gather, dist.reduce_scatter = any_all_gather, any_reduce_scatter
