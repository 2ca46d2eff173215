"""When the operations of a pipeline program ran on this rank, and what the simulator learns from that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from megatron_mhc.pipeline.program import COMPUTE, Message, Op, Plan
from megatron_mhc.pipeline.streams import CudaStreams

DEVICE = torch.empty(0, device="cuda").device  # testing.cpu redirects "cuda"


class Mark:
    """A point in time of the current CUDA stream, or of the host."""

    def __init__(self) -> None:
        self.event: Any = None
        self.at = time.perf_counter()
        if DEVICE.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def since(self, earlier: Mark) -> float:
        if self.event is not None:
            return earlier.event.elapsed_time(self.event)
        return 1e3 * (self.at - earlier.at)

    def wait(self) -> None:
        """Have the current stream wait for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class TimedStreams(CudaStreams):
    """Notes when each node of a fused program began and ended on its stream."""

    def __init__(self, log: Log, post_priority: bool):
        super().__init__(DEVICE, post_priority)
        self.log = log

    @contextmanager
    def on(self, name: str, after: Mark | None = None) -> Iterator[Any]:
        with torch.cuda.stream(self._beside.get(name)):
            if after is not None:
                after.wait()
            op, start = self.log.op, Mark()

            def record() -> Mark:
                end = Mark()
                self.log.nodes.append((op, name, start, end, after))
                return end

            yield SimpleNamespace(record=record)


class Log:
    """What one step did: operations as the host began them, fused nodes, copies."""

    def __init__(self) -> None:
        self.op: Op | None = None
        self.begun: list[tuple[Op, Mark]] = []
        self.nodes: list[tuple[Op | None, str, Mark, Mark, Mark | None]] = []
        self.copies: list[tuple[str, Mark, Mark]] = []

    def observe(self, op: Op, step: Any) -> None:
        self.op = op
        self.begun.append((op, Mark()))


def medians(logs: list[Log], key: Callable[[Op], Hashable]) -> dict[Any, float]:
    """Milliseconds of every kind of compute operation, of programs that ran on one stream."""
    spans: dict[Any, list[float]] = {}
    for log in logs:
        for (op, start), (_, end) in zip(log.begun, log.begun[1:], strict=False):
            if op.kind in COMPUTE:
                spans.setdefault(key(op), []).append(end.since(start))
    return {name: statistics.median(values) for name, values in spans.items()}


class Measured:
    """Costs for the simulator.

    Args:
        ops: milliseconds by `key` of a compute operation; what is not there costs nothing.
        messages: milliseconds by the name of a message.
    """

    def __init__(self, ops: dict[Any, float], messages: dict[str, float], key: Callable[[Op], Hashable]):
        self.ops, self.messages, self.key = ops, messages, key

    def compute(self, plan: Plan, op: Op) -> float:
        return self.ops.get(self.key(op), 0.0)

    def transfer(self, message: Message) -> tuple[float, int]:
        return self.messages[message.name], 1
