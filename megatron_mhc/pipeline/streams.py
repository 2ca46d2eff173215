"""CUDA streams for a schedule, or the order of the host where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.schedule.streams import A2A_STREAM, PRIORITY_STREAM


class NoEvent:
    """An event where the host orders everything."""

    def record(self) -> Any:
        return None


class HostStreams:
    """Everything happens where the host does it; for CPUs and gloo."""

    def posting(self) -> AbstractContextManager[Any]:
        """Around the allocation of a receive buffer and the posting of its receive."""
        return nullcontext()

    @contextmanager
    def on(self, name: str, after: Any = None) -> Iterator[Any]:
        """Run on a stream of that name, behind event `after`; yields what records the next event."""
        yield NoEvent()

    def used(self, tensor: Tensor) -> None:
        """The current stream uses a tensor that another may have allocated."""


class _Recorder:
    def record(self) -> Any:
        return torch.cuda.current_stream().record_event()


class CudaStreams(HostStreams):
    """Three streams next to the current one: for posting receives, for all-to-alls and for the mHC post.

    A receive waits for everything queued on the stream from which it is posted. Posted from the compute
    stream it would wait for all compute so far, and posting ahead would gain nothing.
    """

    def __init__(self, device: torch.device, post_priority: bool = True):
        _, high = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._posting = torch.cuda.Stream(device)
        self._beside = {
            A2A_STREAM: torch.cuda.Stream(device, priority=high),
            PRIORITY_STREAM: torch.cuda.Stream(device, priority=high if post_priority else 0),
        }

    def posting(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._posting)

    @contextmanager
    def on(self, name: str, after: Any = None) -> Iterator[Any]:
        with torch.cuda.stream(self._beside.get(name)):  # None is the current stream
            if after is not None:
                torch.cuda.current_stream().wait_event(after)
            yield _Recorder()

    def used(self, tensor: Tensor) -> None:
        # Not to be reused by its own stream before the current one is done with it.
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


_made: dict[tuple[str, str], HostStreams] = {}  # streams live as long as the process


def streams_for(device: torch.device, backend: str) -> HostStreams:
    """CUDA streams where a CUDA device communicates by itself (NCCL), else the host's order."""
    key = (str(device), backend)
    if key not in _made:
        on_device = device.type == "cuda" and backend == "nccl"
        _made[key] = CudaStreams(device) if on_device else HostStreams()
    return _made[key]
