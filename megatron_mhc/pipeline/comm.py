"""Messages of process groups between pipeline stages: receives posted ahead, sends that nothing waits for."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc.pipeline import loading
from megatron_mhc.pipeline.transport import PipelineError, Transport, about, silent
from megatron_mhc.schedule.program import UP_MESSAGES, Message, Plan, channel

DEFAULT_TIMEOUT = timedelta(minutes=10)  # Megatron's --distributed-timeout-minutes
NAMES = ("forward", "backward")
WRAPS = ("forward_wrap", "backward_wrap")
# Of a message's kernel, which holds its SMs from the moment that it is posted; as many as a fast link needs.
# NCCL_MAX_CTAS overrides it.
CTAS = 4
PENDING = 2  # receives that wait at a time: one from each neighbour


@dataclass(frozen=True)
class Channels:
    """Process groups for the messages of one pipeline, see `program.channel`."""

    ranks: tuple[int, ...]  # global ranks of the pipeline
    groups: dict[str, Any]
    timeout: timedelta
    backend: str
    hosts: Channels | None = None  # the same between hosts, where these pend on the device


_channels: list[tuple[Any, Channels]] = []  # by pipeline group, which is kept alive along with them


def channels_of(pp_group: Any) -> Channels:
    """The channels of a pipeline group; made on the first call, which every rank of the world must make."""
    for group, channels in _channels:
        if group is pp_group:
            return channels
    backend, timeout = dist.get_backend(pp_group), timeout_of(pp_group)
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, tuple(dist.get_process_group_ranks(pp_group)))
    hosts = _make(pipelines, "gloo", timeout) if loading.pends_on_device(backend) else None
    channels = _make(pipelines, backend, timeout, hosts)
    _connect(channels)
    _channels.append((pp_group, channels))
    return channels


def _make(pipelines: list[Any], backend: str, timeout: timedelta, hosts: Channels | None = None) -> Channels:
    mine: dict[str, Any] = {}
    for ranks in sorted(set(pipelines)):
        # Ranks of other pipelines take part, as making a group demands.
        for name in NAMES + (WRAPS if len(ranks) == 2 else ()):
            options = None
            if backend == "nccl":
                # A transfer's kernels need SMs as soon as it may begin: ahead of compute that is queued.
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                options.config.max_ctas = CTAS
            desc = f"MHC_PIPELINE_{name.upper()}"
            group = dist.new_group(ranks, timeout, backend, options, group_desc=desc)
            if dist.get_rank() in ranks:
                mine[name] = group
    return Channels(pipelines[dist.get_rank()], mine, timeout, backend, hosts)


def links(pp: int) -> list[tuple[str, int, int]]:
    """(channel, sending rank, receiving rank) of every link of a pipeline that `program.channel` can name."""
    ring = [(rank, (rank + 1) % pp) for rank in range(pp)] if pp > 1 else []
    if pp == 2:
        return [(NAMES[0], 0, 1), (WRAPS[0], 1, 0), (NAMES[1], 1, 0), (WRAPS[1], 0, 1)]
    return [(NAMES[0], a, b) for a, b in ring] + [(NAMES[1], b, a) for a, b in ring]


def _connect(channels: Channels) -> None:
    """Send a number over every link, in one order on all ranks.

    NCCL connects two ranks at the first message between them in a group, and each host waits there for the
    other. Programs of two ranks that begin on different channels, as under virtual stages with `Plan.ahead`
    of 2, would deadlock.
    """
    me, device = dist.get_rank(), "cuda" if channels.backend == "nccl" else "cpu"
    for name, source, target in links(len(channels.ranks)):
        ends = channels.ranks[source], channels.ranks[target]
        number, group = torch.zeros(1, device=device), channels.groups[name]
        if me not in ends:
            continue
        peer = target if me == ends[0] else source
        try:
            if me == ends[0]:
                dist.send(number, ends[1], group=group)
            else:
                dist.recv(number, ends[0], group=group)
        except RuntimeError as error:
            said = silent(channels.ranks, peer, channels.timeout)
            raise PipelineError(f"pipeline rank {channels.ranks.index(me)}: no connection: {said}") from error
    if device == "cuda":
        torch.cuda.synchronize()  # nothing of this is pending when the step begins, see loading.py


def timeout_of(group: Any) -> timedelta:
    """The timeout of a group's collectives, which --distributed-timeout-minutes sets."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None) or DEFAULT_TIMEOUT


@dataclass
class _Sent:
    message: Message
    work: Any
    tensor: Tensor  # kept until it has left


class GroupTransport(Transport):
    """Messages of process groups: NCCL's, whose receives are posted ahead as kernels, or gloo's."""

    def __init__(self, plan: Plan, rank: int, channels: Channels, *how: Any):
        super().__init__(plan, rank, *how)
        self.channels = channels
        self.place = self.device  # of what is sent and received
        self.coming: dict[Message, tuple[Any, Tensor]] = {}
        self.leaving: deque[_Sent] = deque()
        self.most_leaving = 0

    def post(self, message: Message) -> None:
        name, source, _ = channel(self.plan, message)
        with self.streams.posting():
            buffer = torch.empty(self.shapes[message.name], dtype=self.dtype, device=self.place)
            try:
                work = dist.irecv(buffer, self.channels.ranks[source], group=self.channels.groups[name])
            except RuntimeError as error:
                raise self._error(message, "could not be awaited", source) from error
        self.coming[message] = work, buffer

    def wait(self, message: Message) -> Tensor:
        work, buffer = self.coming.pop(message)
        try:
            if self.channels.backend == "nccl":
                work.wait()  # the stream waits; `drain` and NCCL's watchdog look at the clock
            else:
                work.wait(self.channels.timeout)
        except RuntimeError as error:
            raise self._error(message, "did not come", channel(self.plan, message)[1]) from error
        self.streams.used(buffer)  # allocated on the posting stream
        return buffer

    def send(self, message: Message, tensor: Tensor) -> None:
        name, _, target = channel(self.plan, message)
        tensor = self.checked(message, tensor)
        try:
            work = dist.isend(tensor, self.channels.ranks[target], group=self.channels.groups[name])
        except RuntimeError as error:
            raise self._error(message, "could not be sent", target) from error
        self.leaving.append(_Sent(message, work, tensor))
        self.most_leaving = max(self.most_leaving, len(self.leaving))

    def sweep(self) -> None:
        # Gloo knows of that only in `drain`.
        self.leaving = deque(sent for sent in self.leaving if not sent.work.is_completed())

    def drain(self) -> None:
        deadline = time.monotonic() + self.channels.timeout.total_seconds()
        while self.leaving:
            self._finish(self.leaving.popleft(), deadline)

    def _finish(self, sent: _Sent, deadline: float) -> None:
        try:
            if self.channels.backend != "nccl":
                sent.work.wait(self.channels.timeout)
                return
            while not sent.work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError("timeout")
                time.sleep(1e-4)
        except RuntimeError as error:
            target = channel(self.plan, sent.message)[2]
            raise self._error(sent.message, "was not received", target) from error

    def _error(self, message: Message, what: str, peer: int) -> PipelineError:
        said = silent(self.channels.ranks, peer, self.channels.timeout)
        return PipelineError(f"{about(self.rank, message, what)}: {said}")


def most_on_host(plan: Plan) -> int:
    """How many messages of a rank may lie in host memory, sent and not yet received, without a deadlock.

    A neighbour posts its receives a few compute steps ahead, but a group of micro-batches may leave one
    chunk before it begins with the next.
    """
    return 2 * len(UP_MESSAGES[plan.boundary]) * max(plan.groups())


class HostTransport(GroupTransport):
    """The same messages through the hosts, so that no operation pends on a device; see loading.py.

    The host waits for the current stream and then sends. It waits for a message and then has the current
    stream copy it. Channels are `Channels.hosts`.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.place, self.most = torch.device("cpu"), most_on_host(self.plan)

    def wait(self, message: Message) -> Tensor:
        return super().wait(message).to(self.device)

    def send(self, message: Message, tensor: Tensor) -> None:
        super().send(message, tensor.detach().to(self.place))
        # Gloo says what has left when it is waited for: a whole step's messages would stay in memory.
        while len(self.leaving) > self.most:
            self._finish(self.leaving.popleft(), float("inf"))
