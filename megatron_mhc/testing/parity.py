"""An iteration in any parallel layout, compared with a single process's.

Each rank compares all gradients that it holds, shards and copies alike, with its part of the full ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc.testing.parameters import global_parameters, gradient, shard

# A gradient counts as at least this part of the model's largest, see `differences`.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclasses.dataclass
class Iteration:
    """The mean loss and, by global name, the full gradients of one iteration, on the CPU."""

    loss: float
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, loss: float, chunks: list[Any]) -> Iteration:
        """What a world of one holds after its iteration."""
        return cls(loss, {name: gradient(p).cpu().clone() for name, p in global_parameters(chunks)})


@dataclasses.dataclass
class Comparison:
    """Where a layout differs from its reference: |loss error| and each gradient's relative error."""

    loss: float
    gradients: dict[str, float]

    @property
    def worst(self) -> tuple[float, str]:
        return max((error, name) for name, error in self.gradients.items())


def differences(loss: float, chunks: list[Any], expected: Iteration, dtype: torch.dtype) -> Comparison:
    """Compare what all ranks hold after an iteration; the result is the same on each of them.

    A gradient's error is max|g - e| / max|e|, where max|e| counts as at least FLOOR times the model's
    largest gradient: H_res of equal streams has no gradient at all, and an alpha's is a sum over tokens
    that nearly cancels.

    Raises:
        AssertionError: a parameter of the reference that no rank holds.
    """
    if any(chunk.ddp_config.use_distributed_optimizer for chunk in chunks):
        _restore_sharded_gradients(chunks)
    floor = FLOOR[dtype] * max(g.abs().max().item() for g in expected.gradients.values())
    mine: dict[str, float] = {}
    for name, parameter in global_parameters(chunks):
        wanted = shard(expected.gradients[name], parameter)
        error = (gradient(parameter).cpu() - wanted).abs().max()
        relative = (error / max(expected.gradients[name].abs().max().item(), floor)).item()
        # A NaN must not get lost in max().
        mine[name] = max(relative if relative == relative else float("inf"), mine.get(name, 0.0))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    errors: dict[str, float] = {}
    for part in everyone:
        for name, value in part.items():
            errors[name] = max(value, errors.get(name, 0.0))
    if missing := set(expected.gradients) - set(errors):
        raise AssertionError(f"no rank holds {sorted(missing)}")
    return Comparison(abs(loss - expected.loss), errors)


def _restore_sharded_gradients(chunks: list[Any]) -> None:
    """All-gather gradients that were reduce-scattered; the rest of each buffer is not valid."""
    for chunk in chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                own = shards[group.rank()].clone()
                bucket.grad_data.zero_()
                shards[group.rank()].copy_(own)
                dist.all_reduce(bucket.grad_data, group=group)
