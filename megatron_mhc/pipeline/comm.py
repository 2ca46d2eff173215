"""Messages between pipeline stages: receives posted ahead, sends that nothing waits for."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mhc.config import MHCConfig
from megatron_mhc.pipeline import loading
from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.schedule.plans import OVERLAPPED
from megatron_mhc.schedule.program import UP_MESSAGES, Message, Plan, channel

DEFAULT_TIMEOUT = timedelta(minutes=10)  # Megatron's --distributed-timeout-minutes
NAMES = ("forward", "backward")
WRAPS = ("forward_wrap", "backward_wrap")
# Of a message's kernel, which holds its SMs from the moment that it is posted; as many as a fast link needs.
# NCCL_MAX_CTAS overrides it.
CTAS = 4
PENDING = 2  # receives that wait at a time: one from each neighbour


class PipelineError(RuntimeError):
    """A neighbour failed, or sent nothing within the timeout of the process groups."""


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


def sms_of_receives(config: Any, mhc: MHCConfig) -> int:
    """SMs of a GPU that the receives of the overlapping schedules hold while they wait."""
    if mhc.pipeline_schedule not in OVERLAPPED or config.pipeline_model_parallel_size == 1:
        return 0
    # A training loop may have groups of its own, or none yet.
    group = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if not dist.is_initialized() or dist.get_backend(group) != "nccl":
        return 0
    return PENDING * int(os.environ.get("NCCL_MAX_CTAS") or CTAS)


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

    NCCL connects two ranks at the first message between them in a group, and the host of each waits there
    for the other: where the programs of two ranks begin on different channels, as under virtual stages
    with `Plan.ahead` of 2, both would wait for ever.
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
            raise PipelineError(
                f"pipeline rank {channels.ranks.index(me)}: no connection: {_failed(channels, peer)}"
            ) from error
    if device == "cuda":
        torch.cuda.synchronize()  # nothing of this is pending when the step begins, see loading.py


def timeout_of(group: Any) -> timedelta:
    """The timeout of a group's collectives, which --distributed-timeout-minutes sets."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None) or DEFAULT_TIMEOUT


def _failed(channels: Channels, peer: int) -> str:
    return (
        f"pipeline rank {peer} (global rank {channels.ranks[peer]}) has failed or was silent for "
        f"{channels.timeout.total_seconds():.0f} s (--distributed-timeout-minutes); look at its log first"
    )


@dataclass
class _Sent:
    message: Message
    work: Any
    tensor: Tensor  # kept until it has left


class Transport:
    """Sends and receives of one rank in one step.

    Args:
        shapes: of each kind of message by name; the same on all ranks.
        dtype, device: of all messages.

    Raises (`post`, `send`, `wait`, `drain`):
        PipelineError: a neighbour failed or was silent for the groups' timeout; names the message.
        ValueError: a tensor of another shape or dtype than the message's.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        channels: Channels,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        streams: HostStreams,
    ):
        self.plan, self.rank, self.channels, self.shapes = plan, rank, channels, shapes
        self.dtype, self.device, self.streams = dtype, device, streams
        self.place = device  # of what is sent and received
        self.coming: dict[Message, tuple[Any, Tensor]] = {}
        self.leaving: deque[_Sent] = deque()
        self.most_leaving = 0

    def post(self, message: Message) -> None:
        """Post the receive of a message."""
        name, source, _ = channel(self.plan, message)
        with self.streams.posting():
            buffer = torch.empty(self.shapes[message.name], dtype=self.dtype, device=self.place)
            try:
                work = dist.irecv(buffer, self.channels.ranks[source], group=self.channels.groups[name])
            except RuntimeError as error:
                raise self._error(message, "could not be awaited", source) from error
        self.coming[message] = work, buffer

    def wait(self, message: Message) -> Tensor:
        """Make the current stream (with gloo: the host) wait for a message; returns its tensor."""
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
        """Send a tensor as soon as the current stream has computed it; nothing waits for that."""
        shape = self.shapes[message.name]
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"pipeline message {message} has shape {tuple(tensor.shape)} and {tensor.dtype}, expected "
                f"{shape} and {self.dtype}: every stage needs the same sequence length, micro-batch size, "
                "--mhc-num-residual-streams and pipeline dtype"
            )
        name, _, target = channel(self.plan, message)
        tensor = tensor.detach().contiguous()
        try:
            work = dist.isend(tensor, self.channels.ranks[target], group=self.channels.groups[name])
        except RuntimeError as error:
            raise self._error(message, "could not be sent", target) from error
        self.leaving.append(_Sent(message, work, tensor))
        self.most_leaving = max(self.most_leaving, len(self.leaving))

    def sweep(self) -> None:
        """Let go of what has left; never waits. With gloo that is known in `drain` alone."""
        self.leaving = deque(sent for sent in self.leaving if not sent.work.is_completed())

    def drain(self) -> None:
        """Have the host wait until everything has left."""
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
        return PipelineError(
            f"pipeline rank {self.rank}: message {message.name} of micro-batch {message.microbatch}, stage "
            f"{message.stage}, {what}: {_failed(self.channels, peer)}"
        )


def most_on_host(plan: Plan) -> int:
    """How many messages of a rank may wait in host memory to be received, without a deadlock.

    A neighbour posts its receives a few compute steps ahead, but a group of micro-batches may leave one
    chunk before it begins with the next.
    """
    return 2 * len(UP_MESSAGES[plan.boundary]) * max(plan.groups())


class HostTransport(Transport):
    """The same messages by way of the hosts, between which no operation pends on a device; see loading.py.

    The current stream computes, the host waits for that and sends; and it waits for what it receives before
    that is copied on the current stream. Channels are `Channels.hosts`.
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
