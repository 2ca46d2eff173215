"""What a step asks of its messages, however they travel: `comm.GroupTransport` and `push.PushTransport`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta

import torch
from torch import Tensor

from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.schedule.program import Message, Plan


class PipelineError(RuntimeError):
    """A neighbour failed, or sent nothing within the timeout of the process groups."""


def silent(ranks: tuple[int, ...], peer: int, timeout: timedelta) -> str:
    """What is said of a pipeline rank that does not answer; ranks: global ones."""
    return (
        f"pipeline rank {peer} (global rank {ranks[peer]}) has failed or was silent for "
        f"{timeout.total_seconds():.0f} s (--distributed-timeout-minutes); look at its log first"
    )


def about(rank: int, message: Message, what: str) -> str:
    """The beginning of a `PipelineError`: whose message, and which."""
    return (
        f"pipeline rank {rank}: message {message.name} of micro-batch {message.microbatch}, stage "
        f"{message.stage}, {what}"
    )


class Transport(ABC):
    """Sends and receives of one rank in one step.

    Args:
        shapes: of each kind of message by name; the same on all ranks.
        dtype, device: of all messages.
        streams: on which the step computes.

    Raises (`post`, `send`, `wait`, `drain`):
        PipelineError: a neighbour failed or was silent for the groups' timeout; names the message.
        ValueError: a tensor of another shape or dtype than the message's.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        streams: HostStreams,
    ):
        self.plan, self.rank, self.shapes = plan, rank, shapes
        self.dtype, self.device, self.streams = dtype, device, streams

    @abstractmethod
    def post(self, message: Message) -> None:
        """The program will wait for a message soon."""

    @abstractmethod
    def wait(self, message: Message) -> Tensor:
        """Make the current stream (without streams: the host) wait for a message; returns its tensor.

        The tensor holds the message until `release`.
        """

    @abstractmethod
    def send(self, message: Message, tensor: Tensor) -> None:
        """Send a tensor as soon as the current stream has computed it; nothing waits for that."""

    def release(self, message: Message) -> None:
        """What the current stream does from here on no longer reads a message's tensor."""
        return None

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor that is to be sent, in memory that stays when a message is let go of."""
        return tensor

    def sweep(self) -> None:
        """Free messages that have left, without waiting."""
        return None

    @abstractmethod
    def drain(self) -> None:
        """Have the host wait until everything has left."""

    def abandon(self) -> None:
        """The step failed: let go of what pends."""
        return None

    def checked(self, message: Message, tensor: Tensor) -> Tensor:
        """The contiguous tensor to send."""
        shape = self.shapes[message.name]
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"pipeline message {message} has shape {tuple(tensor.shape)} and {tensor.dtype}, expected "
                f"{shape} and {self.dtype}: every stage needs the same sequence length, micro-batch size, "
                "--mhc-num-residual-streams and pipeline dtype"
            )
        return tensor.detach().contiguous()
