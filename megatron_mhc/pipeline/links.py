"""How a pipeline's messages travel, pushed over peer memory or by process groups: all ranks choose alike."""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import log_single_rank

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.pipeline import comm
from megatron_mhc.pipeline.memory import Memory, SharedMemory
from megatron_mhc.pipeline.push import Pool
from megatron_mhc.schedule.plans import OVERLAPPED

logger = logging.getLogger(__name__)

AUTO, PUSH, NCCL = "auto", "push", "nccl"
_NAMESPACES = ("pid", "net", "ipc", "mnt")  # processes exchange handles of memory within them


class Choice(NamedTuple):
    """What a pipeline's messages take, and why."""

    kind: str  # PUSH, or NCCL for process groups of whatever backend
    why: str

    @property
    def pushes(self) -> bool:
        return self.kind == PUSH


class Card(NamedTuple):
    """What a rank says of itself: its host, its GPU, the GPUs whose memory that reaches, what it lacks."""

    pipeline: tuple[int, ...]  # global ranks
    host: str
    gpu: str
    reaches: tuple[str, ...]
    lacks: str | None


_chosen: list[tuple[Any, str, Choice]] = []  # by pipeline group, which is kept alive along with them
_said: list[Choice] = []
_pools: list[tuple[Any, Pool]] = []


def choose(pp_group: Any, mhc: MHCConfig, say: bool = True) -> Choice:
    """What a pipeline's messages take; every rank of the world must make the first call.

    Args:
        say: whether the log gets it, once.

    Raises:
        ValueError: --mhc-pipeline-transport push where memory is not shared, naming what is in the way.
    """
    asked = mhc.pipeline_transport
    found = (one for group, option, one in _chosen if group is pp_group and option == asked)
    if (choice := next(found, None)) is None:
        choice = _choose(pp_group, asked)
        if asked == PUSH and not choice.pushes:
            name = flag("pipeline_transport")
            instead = f"use {name} auto or nccl, or put a pipeline on one host"
            raise ValueError(f"{name} push: {choice.why}; {instead}")
        _chosen.append((pp_group, asked, choice))
    if say and not any(one is choice for one in _said):
        _said.append(choice)
        means = "pushed over peer memory" if choice.pushes else f"sent over {dist.get_backend(pp_group)}"
        log_single_rank(logger, logging.INFO, f"mHC pipeline messages are {means}: {choice.why}")
    return choice


def _choose(pp_group: Any, asked: str) -> Choice:
    name = f"{flag('pipeline_transport')} {asked}"
    backend = dist.get_backend(pp_group)
    if asked == NCCL:
        return Choice(NCCL, name)
    if asked == AUTO and backend != "nccl":
        return Choice(NCCL, f"{name}, and no GPU has the messages")
    cards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(cards, card_of(pp_group))
    obstacle = obstacle_of(cards)
    return Choice(NCCL, obstacle) if obstacle else Choice(PUSH, name)


def obstacle_of(cards: list[Card]) -> str | None:
    """The first thing that keeps some rank from its neighbours' memory; cards: by global rank."""
    for rank, card in enumerate(cards):
        if card.lacks:
            return f"rank {rank}: {card.lacks}"
        at, ring = card.pipeline.index(rank), card.pipeline
        for peer in (ring[at - 1], ring[(at + 1) % len(ring)]):
            other = cards[peer]
            if other.host != card.host:
                return f"ranks {rank} and {peer} of a pipeline are on two hosts"
            if peer != rank and other.gpu == card.gpu and card.gpu:
                return f"ranks {rank} and {peer} share a GPU"
            if card.gpu and other.gpu not in card.reaches:
                return (
                    f"the GPU of rank {rank} does not reach the memory of rank {peer}'s, or does not see it"
                )
    return None


def card_of(pp_group: Any) -> Card:
    """This rank's card."""
    names = [f"/proc/self/ns/{name}" for name in _NAMESPACES]
    host = " ".join([_boot(), *(os.readlink(name) for name in names if os.path.exists(name))])
    pipeline = tuple(dist.get_process_group_ranks(pp_group))
    if dist.get_backend(pp_group) != "nccl":
        return Card(pipeline, host, "", (), None)
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError:
        return Card(pipeline, host, "", (), "cuda-bindings is not installed")
    own = torch.cuda.current_device()
    gpus = [str(torch.cuda.get_device_properties(at).uuid) for at in range(torch.cuda.device_count())]
    reaches = [
        uuid for at, uuid in enumerate(gpus) if at == own or torch.cuda.can_device_access_peer(own, at)
    ]
    return Card(pipeline, host, gpus[own], tuple(reaches), None)


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return os.uname().nodename


def sms_of_receives(config: Any, mhc: MHCConfig) -> int:
    """SMs of a GPU that the receives of the overlapping schedules hold while they wait; pushes hold none."""
    if mhc.pipeline_schedule not in OVERLAPPED or config.pipeline_model_parallel_size == 1:
        return 0
    # A training loop may have groups of its own, or none yet.
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if not dist.is_initialized() or dist.get_backend(group) != "nccl":
        return 0
    if group is not None and choose(group, mhc).pushes:
        return 0
    return comm.PENDING * int(os.environ.get("NCCL_MAX_CTAS") or comm.CTAS)


def pool_of(pp_group: Any) -> Pool:
    """The slots of a pipeline group; those of groups that are gone are let go of."""
    for group, pool in _pools:
        if group is pp_group:
            return pool
    for old in [one for one in _pools if not _lives(one[0])]:
        old[1].close()
        _pools.remove(old)
    pool = Pool(pp_group, comm.timeout_of(pp_group), _maker(pp_group))
    _pools.append((pp_group, pool))
    return pool


def slots_bytes() -> int:
    """Memory of this rank that holds slots; torch's allocator does not count it."""
    return sum(pool.places.size for _, pool in _pools if pool.places.rooms)


def _maker(pp_group: Any) -> Any:
    def make(size: int, notes: int) -> Memory:
        said = f"mHC pipeline messages have slots of {size / 2**20:.0f} MiB on every rank"
        log_single_rank(logger, logging.INFO, said)
        if dist.get_backend(pp_group) != "nccl":
            return SharedMemory(pp_group, size, notes, comm.timeout_of(pp_group))
        from megatron_mhc.pipeline.device_memory import DeviceMemory

        return DeviceMemory(pp_group, size, notes)

    return make


def _lives(group: Any) -> bool:
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False
