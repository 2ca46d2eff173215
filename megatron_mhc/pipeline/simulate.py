"""Time the programs of all pipeline ranks: step, bubble, exposed communication; no torch.

    python -m megatron_mhc.pipeline.simulate --pp 8 --vpp 4 --microbatches 32 --layers 1 \\
        --attention 1.30 --mlp 1.93 --attention-backward 2.82 --mlp-backward 3.87 --png schedule.png

What is modelled: each rank's compute stream in program order, an all-to-all stream and a high-priority
stream for fused programs; a transfer begins when both ends are posted and its channel is free, and shares
each rank's link, one way in and one way out, with other transfers. What is not: the SMs that
communication occupies, jitter, and all-to-alls sharing the links of transfers.
"""

from __future__ import annotations

import argparse
import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

from megatron_mhc.pipeline.check import Deadlock, peak_in_flight
from megatron_mhc.pipeline.megatron_order import WAIT_SENT, megatron_programs
from megatron_mhc.pipeline.program import (
    ALL,
    ALL_TO_ALL,
    BACKWARD,
    COMPUTE,
    FORWARD,
    HEAD,
    POST,
    REPLAY,
    SEND,
    SPLIT,
    TAIL,
    WAIT,
    WHOLE,
    Message,
    Op,
    Plan,
    build_program,
    channel,
)

COMPUTE_STREAM, A2A_STREAM, PRIORITY_STREAM = "compute", "all-to-all", "priority"


@dataclass(frozen=True)
class Times:
    """Times in milliseconds; the defaults are the paper's 27B at assumed rates (400 TFLOP/s, 45 GB/s).

    Args:
        attention: forward of attention with its norm and mHC operations, and the MLP's mHC pre.
        mlp: forward of the MLP or of the experts.
        post: forward of the MLP's post_res.
        attention_backward, mlp_backward: with weight gradients; all of mHC's counts as attention.
        replay: recomputation of one layer before its gradient comes.
        all_to_all: one dispatch or combine, forward or backward; 0 for dense layers.
        stream: transfer of one stream (C channels of all tokens) to the next rank.
        latency: of any transfer.
        streams: n.
    """

    attention: float = 1.30
    mlp: float = 1.93
    post: float = 0.07
    attention_backward: float = 2.82
    mlp_backward: float = 3.87
    replay: float = 0.22
    all_to_all: float = 0.31
    stream: float = 0.466
    latency: float = 0.02
    streams: int = 4

    def without(self, *names: str) -> Times:
        return replace(self, **dict.fromkeys(names, 0.0))  # type: ignore[arg-type]

    def compute(self, plan: Plan, op: Op) -> float:
        """Duration of a compute operation; unfused, with the all-to-alls that nothing hides."""
        layers = plan.layers_of(op.stage)
        expert = 2 * self.all_to_all
        # Under the split boundary the stage that receives [f, h_post] runs the last post_res of the sender.
        sends, receives = op.stage < plan.stages - 1, op.stage > 0
        moved = self.post * (plan.boundary == SPLIT)
        tail = {FORWARD: self.mlp + expert, BACKWARD: self.mlp_backward + expert}
        whole = {
            FORWARD: layers * (self.attention + self.mlp + self.post + expert) + moved * (receives - sends),
            BACKWARD: layers * (self.attention_backward + self.mlp_backward + expert),
        }
        nodes = {
            FORWARD: {"attention": self.attention, "experts": self.mlp, "post": self.post},
            BACKWARD: {"attention": self.attention_backward, "experts": self.mlp_backward, "post": 0.0},
        }
        if op.kind == REPLAY:
            return layers * self.replay
        if op.what == ALL:
            return whole[op.kind]
        if op.what == TAIL:
            return tail[op.kind]
        if op.what == HEAD:
            return whole[op.kind] - tail[op.kind]
        if op.what in ALL_TO_ALL:
            return self.all_to_all
        enters = moved if op.kind == FORWARD and op.what == "attention" and not op.layer and receives else 0.0
        return nodes[op.kind][op.what] + enters

    def transfer(self, message: Message) -> tuple[float, int]:
        """(duration, number of slices in which it shares a link) of a message."""
        if self.stream == 0:
            return 0.0, 1
        streams = 1 if message.name in ("write", "d_write") else self.streams
        return self.latency + streams * self.stream, streams


@dataclass
class Node:
    """Something that happens once all its predecessors have: an operation or a transfer."""

    duration: float
    missing: int = 0
    then: list[Node] = field(default_factory=list)
    links: tuple[tuple[str, int], ...] = ()
    slices: int = 1
    start: float = -1.0
    end: float = -1.0
    left: int = 0

    def after(self, earlier: Node | None) -> None:
        if earlier is not None:
            earlier.then.append(self)
            self.missing += 1


@dataclass
class Run:
    """The result of one simulation: step time in ms, and (op, start, end) of every rank's operations."""

    step: float
    timeline: list[list[tuple[Op, float, float]]]


class Costs(Protocol):
    """What `simulate` needs to know, of which `Times` is one form and a measurement another."""

    def compute(self, plan: Plan, op: Op) -> float:
        """Milliseconds of a compute operation."""

    def transfer(self, message: Message) -> tuple[float, int]:
        """(milliseconds, slices in which it shares a link) of a message."""


def simulate(
    plan: Plan,
    times: Costs,
    programs: list[list[Op]] | None = None,
    priority: bool = True,
    alone: bool = False,
) -> Run:
    """Run programs in time.

    Args:
        programs: of all ranks; `build_program`'s where None.
        alone: of one rank, whose neighbours are always ready to send and to receive.
        priority: whether a fused program's forward post_res has a high-priority stream, or queues on the
            compute stream, which then waits for the combine before it.

    Raises:
        Deadlock: ranks that wait for each other.
    """
    programs = programs or [build_program(plan, rank) for rank in range(plan.pp)]
    nodes: list[list[tuple[Op, Node]]] = []
    transfers: dict[Message, Node] = {}
    fifo: dict[tuple[int, str, int, int], Node] = {}  # the last transfer queued at one end of a channel
    ends = 1 if alone else 2

    def transfer(message: Message) -> Node:
        if message not in transfers:
            duration, slices = times.transfer(message)
            source, target = message.stage % plan.pp, message.receiver % plan.pp
            links = (("out", source), ("in", target)) if duration else ()
            transfers[message] = Node(duration / slices, missing=ends, links=links, slices=slices)
        return transfers[message]

    for rank, program in enumerate(programs):
        streams: dict[str, Node] = {}
        chains: dict[tuple[bool, int, int], Node] = {}  # the last thing each chunk's forward or backward did
        mine: list[tuple[Op, Node]] = []
        for op in program:
            node = Node(times.compute(plan, op) if op.kind in COMPUTE else 0.0)
            if op.kind in COMPUTE:
                stream = COMPUTE_STREAM
                if op.what in ALL_TO_ALL:
                    stream = A2A_STREAM
                elif op.what == "post" and op.kind == FORWARD and priority:
                    stream = PRIORITY_STREAM
                chain = (op.kind == FORWARD, op.microbatch, op.stage)
                node.after(streams.get(stream))
                node.after(chains.get(chain))
                streams[stream] = chains[chain] = node
            else:
                message = op.message
                moved = transfer(message)
                own = message.receiver if op.kind in (WAIT, POST) else message.stage
                chain = (not message.backward, message.microbatch, own)
                if op.kind == SEND:
                    node.after(chains.get(chain))
                elif op.kind == POST:
                    node.after(streams.get(COMPUTE_STREAM))
                else:
                    node.after(moved)
                    node.after(chains.get(chain) if op.kind == WAIT else None)
                    chains[chain] = node
                    if op.kind == WAIT_SENT or not plan.fused:
                        node.after(streams.get(COMPUTE_STREAM))
                        streams[COMPUTE_STREAM] = node
                if op.kind in (SEND, POST):
                    node.then.append(moved)
                    end = (rank, *channel(plan, message))
                    moved.after(fifo.get(end))
                    fifo[end] = moved
            mine.append((op, node))
        nodes.append(mine)
    step = _run([node for mine in nodes for _, node in mine] + list(transfers.values()))
    first = [next((op for op, node in mine if node.end < 0), None) for mine in nodes]
    if any(first):
        raise Deadlock("; ".join(f"rank {rank} at {op}" for rank, op in enumerate(first) if op))
    timeline = [[(op, node.start, node.end) for op, node in mine] for mine in nodes]
    return Run(step, timeline)


def _run(nodes: list[Node]) -> float:
    now, count = 0.0, 0
    done: list[tuple[float, int, Node]] = []
    queue: deque[Node] = deque()  # transfers that wait for their links
    busy: set[tuple[str, int]] = set()

    def begin(node: Node) -> None:
        nonlocal count
        if node.start < 0:
            node.start, node.left = now, node.slices
        if node.links:
            queue.append(node)
        else:
            count += 1
            heapq.heappush(done, (now + node.duration, count, node))

    def serve() -> None:
        nonlocal count
        for _ in range(len(queue)):
            node = queue.popleft()
            if busy.intersection(node.links):
                queue.append(node)
                continue
            busy.update(node.links)
            count += 1
            heapq.heappush(done, (now + node.duration, count, node))

    for node in [node for node in nodes if not node.missing]:
        begin(node)
    serve()
    while done:
        now, _, node = heapq.heappop(done)
        busy.difference_update(node.links)
        node.left -= 1
        if node.links and node.left:
            queue.append(node)
        else:
            node.end = now
            for later in node.then:
                later.missing -= 1
                if not later.missing:
                    begin(later)
        serve()
    return now


@dataclass(frozen=True)
class Result:
    """Milliseconds of one step, and where they go."""

    step: float
    ideal: float
    bubble: float
    all_to_all: float
    p2p: float
    in_flight: int

    @property
    def efficiency(self) -> float:
        return self.ideal / self.step


def measure(
    plan: Plan,
    times: Times,
    programs: Callable[[Plan], list[list[Op]]] | None = None,
    priority: bool = True,
) -> Result:
    """Take a step apart by leaving out one kind of communication after the other.

    Args:
        programs: makes the programs of all ranks; `build_program`'s where None.
    """
    built = programs(plan) if programs else [build_program(plan, rank) for rank in range(plan.pp)]
    steps = [
        simulate(plan, t, built, priority).step
        for t in (times, times.without("stream"), times.without("stream", "all_to_all"))
    ]
    quiet = times.without("all_to_all")
    busy: dict[int, float] = defaultdict(float)
    for rank, program in enumerate(built):
        for op in program:
            if op.kind in COMPUTE:
                busy[rank] += quiet.compute(plan, op)
    ideal = max(busy.values())
    peak = max(peak_in_flight(program) for program in built)
    return Result(steps[0], ideal, steps[2] - ideal, steps[1] - steps[2], steps[0] - steps[1], peak)


def schedules(plan: Plan, times: Times) -> dict[str, Result]:
    """Measure Megatron's order and the plugin's, unfused and fused, with both boundaries."""
    results = {}
    if plan.vpp > 1 and not plan.microbatches % plan.pp:
        results["Megatron's order"] = measure(plan, times, megatron_programs)
    for fused in (False, True):
        for boundary in (WHOLE, SPLIT):
            name = f"{'fused' if fused else 'interleaved'}, {boundary}"
            results[name] = measure(replace(plan, fused=fused, boundary=boundary), times)
    return results


def table(results: dict[str, Result]) -> str:
    """One line for each schedule."""
    lines = [f"{'ms':20}{'step':>9}{'bubble':>9}{'a2a':>8}{'p2p':>8}{'efficiency':>12}{'in flight':>11}"]
    for name, r in results.items():
        lines.append(
            f"{name:20}{r.step:9.1f}{r.bubble:9.1f}{r.all_to_all:8.1f}{r.p2p:8.1f}{r.efficiency:11.1%}"
            f"{r.in_flight:11}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table, and draw the timeline of one schedule if a path is given."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.pipeline.simulate", description=main.__doc__, allow_abbrev=False
    )
    for name, default in dict(pp=8, vpp=4, microbatches=32, layers=1).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for f in fields(Times):
        kind = int if f.name == "streams" else float
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default)
    parser.add_argument("--png", help="where to draw the timeline")
    parser.add_argument(
        "--draw", default="interleaved, split", help="schedule to draw, as the table names it"
    )
    args = parser.parse_args(argv)
    times = Times(**{f.name: getattr(args, f.name) for f in fields(Times)})
    plan = Plan(args.pp, args.vpp, args.microbatches, layers=args.layers, replay=times.replay > 0)
    results = schedules(plan, times)
    ideal = next(iter(results.values())).ideal
    print(f"pp={plan.pp} vpp={plan.vpp} microbatches={plan.microbatches}: {ideal:.1f} ms of compute a step")
    print(table(results))
    if args.png:
        from megatron_mhc.pipeline.picture import draw

        if args.draw not in results:
            raise ValueError(f"--draw {args.draw!r}: choose one of {', '.join(map(repr, results))}")
        built = None
        if args.draw == "Megatron's order":
            built = megatron_programs(plan)
        else:
            how, boundary = args.draw.split(", ")
            plan = replace(plan, fused=how == "fused", boundary=boundary)
        draw(simulate(plan, times, built), plan, args.png, args.draw)


if __name__ == "__main__":
    main()
