"""Stand-ins on one GPU for the other ranks of a pipeline: copies to and from pinned host memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from timeline import DEVICE, Log, Mark, synchronize

from megatron_mhc.pipeline.comm import Transport
from megatron_mhc.pipeline.costs import APART, AWAIT, COPY, FAIR, IN, OUT, REPORT, STREAM


class Copies:
    """Two copy streams, one each way, and pinned host memory for every kind of message."""

    def __init__(self) -> None:
        cuda = DEVICE.type == "cuda"
        self.inward = torch.cuda.Stream(DEVICE) if cuda else None
        self.outward = torch.cuda.Stream(DEVICE) if cuda else None
        self.host: dict[Any, torch.Tensor] = {}

    def stream(self, way: str) -> Any:
        return self.outward if way == OUT else self.inward

    def buffer(self, key: Any, like: torch.Tensor) -> torch.Tensor:
        if key not in self.host or self.host[key].numel() < like.numel():
            values = (1e-3 * torch.randn(like.shape, device=DEVICE)).to(like.dtype)  # fast where it is large
            pinned = DEVICE.type == "cuda"
            self.host[key] = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self.host[key].copy_(values)
        return self.host[key].view(-1)[: like.numel()].view(like.shape)


class LoopTransport(Transport):
    """A `Transport` whose neighbours are host memory.

    Args:
        copy: False leaves the copies out: the time of everything else.
        late: post receives from the compute stream, which they then wait for, as Megatron does.
    """

    def __init__(self, *args: Any, copies: Copies, log: Log, copy: bool, late: bool):
        super().__init__(*args)
        self.copies, self.log, self.copy, self.late = copies, log, copy, late
        self.sent: dict[Any, Mark] = {}

    def _run(
        self, way: str, name: str, target: torch.Tensor, source: torch.Tensor, after: Mark | None
    ) -> Mark:
        stream = self.copies.stream(way)
        if stream is None:
            start = Mark()
            target.copy_(source)
            end = Mark()
        else:
            with torch.cuda.stream(stream):
                if after is not None:
                    after.wait()
                start = Mark()
                target.copy_(source, non_blocking=True)
                end = Mark()
            for tensor in (target, source):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        self.log.copies.append((name, start, end))
        self.log.ways.append(way)
        return end

    def post(self, message: Any) -> None:
        with torch.cuda.stream(self.copies.inward):  # whose memory is free when its turn comes
            buffer = torch.empty(self.shapes[message.name], dtype=self.dtype, device=self.device)
        source = self.copies.buffer(message.name, buffer)
        if not self.copy:
            key = ("device", message.name)
            if key not in self.copies.host:
                self.copies.host[key] = source.to(self.device)
            self.coming[message] = None, self.copies.host[key].detach()  # no copy of any kind
            return
        end = self._run(IN, message.name, buffer, source, Mark() if self.late else None)
        self.coming[message] = end, buffer

    def wait(self, message: Any) -> torch.Tensor:
        end, buffer = self.coming.pop(message)
        if end is not None:
            end.wait()
        if buffer.is_cuda:
            buffer.record_stream(torch.cuda.current_stream())
        return buffer

    def send(self, message: Any, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().contiguous()
        assert tuple(tensor.shape) == self.shapes[message.name] and tensor.dtype == self.dtype
        if self.copy:
            target = self.copies.buffer(("sent", message.name), tensor)
            self.sent[message] = self._run(OUT, message.name, target, tensor, Mark())

    def wait_sent(self, message: Any) -> None:
        if message in self.sent:
            self.sent[message].wait()

    def sweep(self) -> None:
        pass

    drain = sweep


class Exchange(torch.autograd.Function):
    """Stands for an all-to-all, forward and backward.

    `how` is "copy": a share of the tokens goes to the host and back, over the link that messages take; or
    "wait": the stream waits for `cycles` of the GPU's clock, as for a link that messages do not take.
    """

    copies: Copies
    active, share, how, cycles = True, 1.0, "copy", 0
    log = Log()  # of the step that runs

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor) -> torch.Tensor:
        return Exchange.move(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return Exchange.move(gradient)

    @staticmethod
    def move(tokens: torch.Tensor) -> torch.Tensor:
        out = tokens.detach().clone()
        if not Exchange.active:
            return out
        start = Mark()
        if Exchange.how == "wait":
            if DEVICE.type == "cuda":
                torch.cuda._sleep(Exchange.cycles)
            Exchange.log.part(APART, start, Mark())
            return out
        moved = out[: int(Exchange.share * len(out))]
        host = Exchange.copies.buffer(("exchange", tokens.shape[-1:]), moved)
        host.copy_(moved, non_blocking=True)
        middle = Mark()
        moved.copy_(host, non_blocking=True)
        Exchange.log.part(OUT, start, middle)
        Exchange.log.part(IN, middle, Mark())
        return out


def exchange(dispatcher: Any) -> None:
    """Put an `Exchange` in front of both all-to-alls of a dispatcher; the log learns where its host waits."""
    dispatch, combine = dispatcher.token_dispatch, dispatcher.token_combine
    to_host = dispatcher._maybe_dtoh_and_synchronize

    def token_dispatch(hidden: torch.Tensor, probs: torch.Tensor) -> Any:
        return dispatch(Exchange.apply(hidden), probs)

    def token_combine(hidden: torch.Tensor) -> Any:
        return combine(Exchange.apply(hidden))

    def tell_host(point: str, tokens: Any = None) -> Any:
        moves = not dispatcher.drop_and_pad
        if moves and point == dispatcher.cuda_dtoh_point:
            Exchange.log.part(REPORT, Mark())
        start = Mark() if moves and point == dispatcher.cuda_sync_point else None
        tokens = to_host(point, tokens)
        if start is not None:
            Exchange.log.part(AWAIT, start, Mark())
        return tokens

    dispatcher.token_dispatch, dispatcher.token_combine = token_dispatch, token_combine
    dispatcher._maybe_dtoh_and_synchronize = tell_host


REPEATS, QUEUED, LATER = 5, 3, 1_000_000  # times, copies in a row, cycles after which another copy asks


class Link:
    """Measures the link on its own.

    Args:
        shapes: of every kind of message, by name; rows: tokens that one all-to-all copies; width: of a token.
    """

    def __init__(self, copies: Copies, shapes: dict[str, tuple[int, ...]], rows: int, width: int, dtype: Any):
        self.copies, self.dtype = copies, dtype
        self.shapes = shapes | {"exchange": (max(rows, 1), width)}
        self.largest = max(shapes, key=lambda name: torch.Size(shapes[name]).numel())

    def measured(self) -> dict[str, Any]:
        """What a `Machine` and a rank's transfers need; all in ms."""
        alone = {name: {way: self._alone(name, way) for way in (OUT, IN)} for name in self.shapes}
        found: dict[str, Any] = {"alone": alone, "report": self._report(None)}
        if DEVICE.type != "cuda":
            return found | {"both ways": 1.0, "report behind a message": 0.0, "turns": {}, "asked": []}
        both = sum(self._both_ways()) / sum(alone[self.largest].values())
        found |= {"both ways": max(1.0, both), "report behind a message": self._report(self.largest)}
        asked = [self._asked(way, high) | {"way": way, "high": high} for way in (OUT, IN) for high in (0, 1)]
        return found | {"asked": asked, "turns": {name: turns(asked, high) for name, high in PRIORITIES}}

    def _pair(self, name: str, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(target, source) of a copy."""
        device = torch.empty(self.shapes[name], dtype=self.dtype, device=DEVICE)
        host = self.copies.buffer(("link", way, self.shapes[name]), device)
        return (host, device) if way == OUT else (device, host)

    def _copy(self, pair: tuple[torch.Tensor, torch.Tensor], stream: Any, gate: Mark | None = None) -> Any:
        with torch.cuda.stream(stream):
            if gate is not None:
                gate.wait()
            start = Mark()
            pair[0].copy_(pair[1], non_blocking=True)
            return start, Mark()

    def _median(self, once: Any) -> Any:
        rows = []
        for _ in range(1 + REPEATS):
            synchronize()
            marks = once()
            synchronize()
            rows.append([end.since(start) for start, end in marks])
        return [statistics.median(column) for column in zip(*rows[1:], strict=True)]

    def _alone(self, name: str, way: str) -> float:
        pair = self._pair(name, way)
        return self._median(lambda: [self._copy(pair, self.copies.stream(way))])[0]

    def _both_ways(self) -> list[float]:
        pairs = {way: self._pair(self.largest, way) for way in (OUT, IN)}

        def once() -> list[tuple[Mark, Mark]]:
            torch.cuda._sleep(LATER)  # so that both have been launched when they may begin
            gate = Mark()
            return [self._copy(pairs[way], self.copies.stream(way), gate) for way in (OUT, IN)]

        return self._median(once)

    def _asked(self, way: str, high: int) -> dict[str, float]:
        """A small copy asks while the first of several large ones in a row is under way."""
        large = [self._pair(self.largest, way) for _ in range(QUEUED)]
        small = self._pair("exchange", way)
        stream = torch.cuda.Stream(priority=-high)

        def once() -> list[tuple[Mark, Mark]]:
            rows = [self._copy(pair, self.copies.stream(way)) for pair in large]
            with torch.cuda.stream(stream):
                rows[0][0].wait()
                torch.cuda._sleep(LATER)
            asked, got = self._copy(small, stream)
            return [(rows[0][0], asked), (asked, got), (rows[0][0], rows[-1][1]), rows[0]]

        after, waited, queued, first = self._median(once)
        alone = self._alone("exchange", way)
        expected = {FAIR: 2 * alone, COPY: first - after + alone}
        expected[STREAM] = queued - after + alone
        return {"waited": waited, "alone": alone, "after": after, "queued": queued} | expected

    def _report(self, behind: str | None) -> float:
        """A few numbers to the host, as a dispatcher sends them; perhaps while a message goes there."""
        numbers = torch.zeros(8, dtype=torch.long, device=DEVICE)
        pair = self._pair(behind, OUT) if behind else None
        stream = torch.cuda.Stream()

        def once() -> list[tuple[Mark, Mark]]:
            with torch.cuda.stream(stream):
                if pair is not None:
                    self._copy(pair, self.copies.outward)[0].wait()
                    torch.cuda._sleep(LATER)
                start = Mark()
                numbers.to("cpu", non_blocking=True)
                return [(start, Mark())]

        return self._median(once)[0]


PRIORITIES = (("normal", 0), ("high", 1))  # of the streams that ask


def turns(asked: list[dict[str, Any]], high: int) -> str:
    """Which of `Machine`'s rules explains best how long copies waited."""

    def off(rule: str) -> float:
        return sum((row["waited"] - row[rule]) ** 2 for row in asked if row["high"] == high)

    return min((FAIR, COPY, STREAM), key=off)


def cycles_per_ms() -> float:
    """Of `torch.cuda._sleep`."""
    if DEVICE.type != "cuda":
        return 0.0
    marks = []
    for _ in range(3):
        synchronize()
        start = Mark()
        torch.cuda._sleep(10 * LATER)
        marks.append((start, Mark()))
        synchronize()
    return 10 * LATER / statistics.median(end.since(start) for start, end in marks)
