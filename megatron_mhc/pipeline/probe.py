"""How fast this machine's GEMMs and messages are, measured once where a model is built; ranks agree on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mhc.pipeline.layer_times import Layer, Machine

# By pipeline group, kept alive along with it, and by what was measured.
_measured: list[tuple[Any, tuple[Layer, int, torch.dtype], Machine]] = []


def everywhere(value: Any) -> list[Any]:
    """What every rank of the world says, by rank; all of them must call."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def machine_of(pp_group: Any, layer: Layer, streams: int, dtype: torch.dtype) -> Machine:
    """The slowest rank's rates for such a layer; every rank of the world must make the first call.

    Messages of all ranks of all pipelines travel at the same time, as do the all-to-alls of experts.

    Args:
        streams: n; a message is n * layer.stream bytes.
        dtype: of the layer's GEMMs.
    """
    asked = layer, streams, dtype
    for group, known, machine in _measured:
        if group is pp_group and known == asked:
            return machine
    device = torch.empty(0, device="cuda").device
    message = streams * layer.stream
    flops = 2 * layer.tokens * layer.width * layer.inner / _gemm(layer, dtype, device)
    gbs = message / _ring(pp_group, message, device) / 1e9
    exchange = gbs
    if layer.exchanged:
        experts = parallel_state.get_expert_model_parallel_group()
        exchange = layer.exchanged / _all_to_all(experts, layer.exchanged, device) / 1e9
    torch.cuda.empty_cache()
    rates = everywhere((flops, gbs, exchange))
    machine = Machine(*(min(rate) for rate in zip(*rates, strict=True)))
    _measured.append((pp_group, asked, machine))
    return machine


def _seconds(run: Callable[[], Any], times: int = 1) -> float:
    """Median of five, of `times` calls in a row, behind two that warm up."""
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) / times)
    return median(found[2:])


def _gemm(layer: Layer, dtype: torch.dtype, device: torch.device) -> float:
    own = torch.Generator(device).manual_seed(0)  # the default one initialises the model
    a = torch.randn(layer.tokens, layer.width, device=device, generator=own).to(dtype)
    b = torch.randn(layer.width, layer.inner, device=device, generator=own).to(dtype)
    return _seconds(lambda: a @ b, times=10)


def _ring(group: Any, size: int, device: torch.device) -> float:
    """A message from every rank to the next one, and from the one before."""
    ranks, at = dist.get_process_group_ranks(group), group.rank()
    out, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    send = dist.P2POp(dist.isend, out, ranks[(at + 1) % len(ranks)], group)
    receive = dist.P2POp(dist.irecv, into, ranks[at - 1], group)

    def run() -> None:
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    return _seconds(run)


def _all_to_all(group: Any, leaves: float, device: torch.device) -> float:
    """An all-to-all of which so many bytes leave a rank."""
    ranks = group.size()
    block = max(1, round(leaves / (ranks - 1)))
    out, into = (torch.zeros(ranks * block, dtype=torch.uint8, device=device) for _ in range(2))
    return _seconds(lambda: dist.all_to_all_single(into, out, group=group))
