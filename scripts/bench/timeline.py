"""When the operations of a pipeline program ran on this rank, and what the simulator learns from that."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from megatron_mhc.pipeline.costs import AWAIT, KERNEL, REPORT, Costs
from megatron_mhc.pipeline.streams import CudaStreams
from megatron_mhc.schedule.program import COMPUTE, FORWARD, Message, Op, Plan

DEVICE = torch.empty(0, device="cuda").device  # testing.cpu redirects "cuda"


class Mark:
    """A point in time of the current CUDA stream, and of the host."""

    def __init__(self) -> None:
        self.event: Any = None
        self.at = time.perf_counter()
        if DEVICE.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def since(self, earlier: Mark) -> float:
        if self.event is not None:
            return earlier.event.elapsed_time(self.event)
        return self.host_since(earlier)

    def host_since(self, earlier: Mark) -> float:
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


class Part(NamedTuple):
    """What is not a kernel in the midst of an operation; see costs.py for its kinds."""

    op: Op | None
    kind: str
    start: Mark
    end: Mark


class Log:
    """What one step did: operations as the host began them, their parts, fused nodes, copies.

    Args:
        alone: the host lets the device end everything before it begins an operation, so that it never waits
            for room in the device's queue: what it takes then is its own time.
    """

    def __init__(self, alone: bool = False) -> None:
        self.alone = alone
        self.origin: Mark | None = None
        self.op: Op | None = None
        self.begun: list[tuple[Op, Mark]] = []
        self.came: list[float] = []  # when the host came to each
        self.parts: list[Part] = []
        self.nodes: list[tuple[Op | None, str, Mark, Mark, Mark | None]] = []
        self.copies: list[tuple[str, Mark, Mark]] = []
        self.ways: list[str] = []  # of each copy: out or in

    def observe(self, op: Op, step: Any) -> None:
        self.came.append(time.perf_counter())
        if self.alone:
            synchronize()
        self.op = op
        self.begun.append((op, Mark()))

    def part(self, kind: str, start: Mark, end: Mark | None = None) -> None:
        self.parts.append(Part(self.op, kind, start, end or start))

    def spans(self) -> Iterator[tuple[Op, Mark, Mark, float]]:
        """Every operation but the last, with its start, its end and when the host had launched it."""
        for (op, start), (_, end), left in zip(self.begun, self.begun[1:], self.came[1:], strict=False):
            yield op, start, end, left


def medians(logs: list[Log], key: Callable[[Op], Hashable]) -> dict[Any, float]:
    """Milliseconds of every kind of compute operation, of programs that ran on one stream."""
    found: dict[Any, list[float]] = {}
    for log in logs:
        for op, start, end, _ in log.spans():
            if op.kind in COMPUTE:
                found.setdefault(key(op), []).append(end.since(start))
    return {name: statistics.median(values) for name, values in found.items()}


def phases(logs: list[Log], key: Callable[[Op], Hashable]) -> dict[Any, list[tuple[str, float, float]]]:
    """(kind, milliseconds on the device, of the host) of the phases of every kind of compute operation.

    Medians; of the logs one step's may be on one stream, for the device, and another's `alone`, for the host.
    """
    device: dict[tuple[Any, tuple[str, ...]], list[list[float]]] = {}
    host: dict[tuple[Any, tuple[str, ...]], list[list[float]]] = {}
    for log in logs:
        inside: dict[int, list[Part]] = {}
        for part in log.parts:
            inside.setdefault(id(part.op), []).append(part)
        for op, start, end, left in log.spans():
            if op.kind not in COMPUTE:
                continue
            kinds, times, at = [], [], start
            for part in inside.get(id(op), []):
                if part.start is not at:
                    kinds.append(KERNEL)
                    times.append((part.start.since(at), part.start.host_since(at)))
                kinds.append(part.kind)
                times.append((part.end.since(part.start), part.end.host_since(part.start)))
                at = part.end
            kinds.append(KERNEL)
            times.append((end.since(at), 1e3 * (left - at.at)))
            name = key(op), tuple(kinds)
            (host if log.alone else device).setdefault(name, []).append([t[log.alone] for t in times])
    found: dict[Any, list[tuple[str, float, float]]] = {}
    common = Counter({name: len(rows) for name, rows in device.items()}).most_common()
    for (name, kinds), _ in reversed(common):  # the most common form of an operation is the last one written
        on_device = [statistics.median(column) for column in zip(*device[name, kinds], strict=True)]
        on_host = [statistics.median(c) for c in zip(*host.get((name, kinds), []), strict=True)]
        rows = zip(kinds, on_device, on_host or [0.0] * len(kinds), strict=True)
        waiting = (REPORT, AWAIT)  # how long they take depends on what else there is
        found[name] = [(kind, *((0.0, 0.0) if kind in waiting else (ms, host))) for kind, ms, host in rows]
    return found


def host_times(logs: list[Log]) -> dict[str, float]:
    """Milliseconds of the host, by kind, for operations that do not compute; of logs that are `alone`."""
    found: dict[str, list[float]] = {}
    for log in logs:
        for op, start, _, left in log.spans():
            if op.kind not in COMPUTE:
                found.setdefault(op.kind, []).append(1e3 * (left - start.at))
    return {kind: statistics.median(values) for kind, values in found.items()}


def lead(logs: list[Log]) -> int:
    """How many compute operations the host had begun, at most, that the device had not ended."""
    most = 0
    for log in logs:
        ends: list[float] = []
        assert log.origin is not None
        for op, start, end, _ in log.spans():
            if op.kind in COMPUTE:
                came = start.host_since(log.origin)
                most = max(most, sum(end > came for end in ends))
                ends.append(end.since(log.origin))
    return most


def inputs(serial: list[Log], alone: list[Log], key: Callable[[Op], Hashable]) -> dict[str, Any]:
    """What the simulator learns from steps on one stream and steps that are `alone`."""
    return {"phases": phases(serial + alone, key), "host": host_times(alone), "lead": lead(serial)}


def moved(logs: list[Log]) -> dict[str, float]:
    """Median milliseconds of every kind of message."""
    moves: dict[str, list[float]] = {}
    for log in logs:
        for name, start, end in log.copies:
            moves.setdefault(name, []).append(end.since(start))
    return {name: statistics.median(values) for name, values in moves.items()}


def latencies(logs: list[Log]) -> dict[str, float]:
    """From the end of a combine to the end of the post_res behind it: median and 95th percentile, ms."""
    found = [
        end.since(after)
        for log in logs
        for op, _, _, end, after in log.nodes
        if op is not None and op.kind == FORWARD and op.what == "post" and after is not None
    ]
    if not found:
        return {}
    found.sort()
    return {"median": statistics.median(found), "p95": found[int(0.95 * (len(found) - 1))]}


def raw(log: Log) -> dict[str, Any]:
    """All that a step noted, in ms since its start: of the device, and where it says so, of the host."""
    origin = log.origin
    assert origin is not None

    def device(mark: Mark) -> float:
        return round(mark.since(origin), 4)

    def host(mark: Mark) -> float:
        return round(mark.host_since(origin), 4)

    number = {id(op): at for at, (op, _) in enumerate(log.begun)}
    return {
        "operations: op, host came, host, device": [
            [*op, round(1e3 * (came - origin.at), 4), host(mark), device(mark)]
            for (op, mark), came in zip(log.begun, log.came, strict=True)
        ],
        "parts: operation, kind, start, end, host start, host end": [
            [number.get(id(p.op), -1), p.kind, device(p.start), device(p.end), host(p.start), host(p.end)]
            for p in log.parts
        ],
        "nodes: operation, stream, start, end": [
            [number.get(id(op), -1), stream, device(start), device(end)]
            for op, stream, start, end, _ in log.nodes
        ],
        "copies: message, way, start, end": [
            [name, way, device(start), device(end)]
            for (name, start, end), way in zip(log.copies, log.ways, strict=True)
        ],
    }


class Measured(Costs):
    """Costs for the simulator where all ranks are measured together.

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
