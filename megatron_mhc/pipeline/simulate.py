"""Time the programs of all pipeline ranks: step, bubble, exposed communication; no torch.

    python -m megatron_mhc.pipeline.simulate --pp 8 --vpp 4 --microbatches 32 --layers 1 \\
        --attention 1.30 --mlp 1.93 --attention-backward 2.82 --mlp-backward 3.87 --png schedule.png

What is modelled: each rank's compute stream in program order, an all-to-all stream and a high-priority
stream for fused programs; a transfer begins when both ends are posted and its channel is free, and shares
each rank's link, one way in and one way out, with other transfers. What is not: the SMs that
communication occupies, kernels of several streams sharing a GPU, hosts that launch late or wait, copy
engines, jitter, and, without --shared-link, all-to-alls sharing the links of transfers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from megatron_mhc.pipeline.costs import Phase, Times
from megatron_mhc.pipeline.events import Node, run
from megatron_mhc.pipeline.megatron_order import WAIT_SENT, megatron_programs
from megatron_mhc.schedule.check import Deadlock, peak_in_flight
from megatron_mhc.schedule.program import (
    COMPUTE,
    FORWARD,
    POST,
    SEND,
    SPLIT,
    WAIT,
    WHOLE,
    Message,
    Op,
    Plan,
    build_program,
    channel,
)
from megatron_mhc.schedule.streams import COMPUTE_STREAM, PRIORITY_STREAM, stream_of

LAYOUT = {  # option -> (default, meaning)
    "pp": (8, "pipeline ranks"),
    "vpp": (4, "chunks of the model on a rank"),
    "microbatches": (32, "micro-batches of a step"),
    "layers": (1, "layers of a chunk"),
}
MEANINGS = {
    "attention": "forward of one layer's attention, with its norm and mHC operations and the MLP's mHC pre",
    "mlp": "forward of one layer's MLP, or of its experts",
    "post": "forward of the MLP's post_res",
    "attention_backward": "backward of attention and of all mHC operations, with weight gradients",
    "mlp_backward": "backward of the MLP or of the experts, with weight gradients",
    "replay": "recomputation of one layer in front of its backward; 0 for none",
    "all_to_all": "one dispatch or combine of experts, forward or backward; 0 for dense layers",
    "stream": "transfer of one stream (C channels of all tokens) to the next rank",
    "latency": "latency of any transfer",
    "streams": "residual streams, n",
    "shared_link": "all-to-alls take both directions of the link that messages go over",
}
COLUMNS = """Columns of the table, in milliseconds, of the rank that has most:
  step         one training step, without the optimizer
  bubble       of it, ranks that wait although communication takes no time
  a2a, p2p     of it, exposed all-to-alls and exposed messages between stages
  efficiency   compute of the busiest rank / step
  in flight    chunks of micro-batches, run forward and not yet backward, that a rank holds at most
               (a count)
"""
Chain = tuple[bool, int, int]  # a micro-batch's forward or backward of one stage


@dataclass
class Run:
    """The result of one simulation: step time in ms, and (op, start, end) of every rank's operations."""

    step: float
    timeline: list[list[tuple[Op, float, float]]]


def simulate(
    plan: Plan,
    times: Times,
    programs: list[list[Op]] | None = None,
    priority: bool = True,
) -> Run:
    """Run programs in time.

    Args:
        programs: of all ranks; `build_program`'s where None.
        priority: whether a fused program's forward post_res has a high-priority stream, or queues on the
            compute stream, which then waits for the combine before it.

    Raises:
        Deadlock: ranks that wait for each other.
    """
    programs = programs or [build_program(plan, rank) for rank in range(plan.pp)]
    transfers = _Transfers(plan, times)
    ranks = [_Rank(plan, program, times, priority, transfers) for program in programs]
    step = run([node for rank in ranks for node in rank.nodes] + list(transfers.made.values()))
    stuck = [next((op for op, _, last in rank.ops if last.end < 0), None) for rank in ranks]
    if any(stuck):
        raise Deadlock("; ".join(f"rank {rank} at {op}" for rank, op in enumerate(stuck) if op))
    return Run(step, [[(op, first.start, last.end) for op, first, last in rank.ops] for rank in ranks])


class _Transfers:
    """The messages of all ranks; each begins once both ends are posted, one after the other on a channel."""

    def __init__(self, plan: Plan, times: Times):
        self._plan, self._times = plan, times
        self.made: dict[Message, Node] = {}
        self._queued: dict[tuple[int, str, int, int], Node] = {}  # the last one at one end of a channel

    def of(self, message: Message) -> Node:
        if message not in self.made:
            duration, slices = self._times.transfer(message)
            node = Node(duration / slices, missing=2, slices=slices)
            if duration:
                source, target = message.stage % self._plan.pp, message.receiver % self._plan.pp
                node.uses = ("out", source), ("in", target)
            self.made[message] = node
        return self.made[message]

    def post(self, rank: int, message: Message, node: Node) -> None:
        """One end of a message is posted when `node` happens."""
        moved = self.of(message)
        node.then.append(moved)
        end = rank, *channel(self._plan, message)
        moved.after(self._queued.get(end))
        self._queued[end] = moved


class _Rank:
    """The operations of one rank as nodes."""

    def __init__(self, plan: Plan, program: list[Op], times: Times, priority: bool, transfers: _Transfers):
        self.plan, self.times, self.priority, self.transfers = plan, times, priority, transfers
        self.rank = next(op.stage for op in program if op.kind in COMPUTE) % plan.pp
        self.nodes: list[Node] = []
        self.ops: list[tuple[Op, Node, Node]] = []  # with their first and last nodes
        self.streams: dict[str, Node] = {}  # the last that each stream did, and each chain
        self.chains: dict[Chain, Node] = {}
        for op in program:
            first, last = self._compute(op) if op.kind in COMPUTE else self._exchange(op)
            self.ops.append((op, first, last))

    def _node(self, duration: float = 0.0) -> Node:
        self.nodes.append(Node(duration))
        return self.nodes[-1]

    def _stream(self, op: Op) -> str:
        stream = stream_of(op.what, moe=True)
        return COMPUTE_STREAM if stream == PRIORITY_STREAM and not self.priority else stream

    def _compute(self, op: Op) -> tuple[Node, Node]:
        stream, chain = self._stream(op), (op.kind == FORWARD, op.microbatch, op.stage)
        done = []
        for phase in self.times.phases(self.plan, op):
            done += self._phase(phase, stream, chain)
            self.streams[stream] = self.chains[chain] = done[-1]
        return done[0], done[-1]

    def _phase(self, phase: Phase, stream: str, chain: Chain) -> list[Node]:
        """Its nodes; the last one is its end."""
        before = self.streams.get(stream), self.chains.get(chain)
        if not phase.link or not phase.ms:
            return [self._node(phase.ms).after(*before)]
        nodes = [self._node(phase.ms / phase.slices).after(*before) for _ in range(2)]
        for node, way in zip(nodes, ("out", "in"), strict=True):
            node.uses, node.slices = ((way, self.rank),), phase.slices
        return [*nodes, self._node().after(*nodes)]

    def _exchange(self, op: Op) -> tuple[Node, Node]:
        message = op.message
        own = message.receiver if op.kind in (WAIT, POST) else message.stage
        chain = (not message.backward, message.microbatch, own)
        node, compute = self._node(), self.streams.get(COMPUTE_STREAM)
        if op.kind == SEND:
            node.after(self.chains.get(chain))
        elif op.kind == POST:
            node.after(compute)
        else:
            node.after(self.transfers.of(message), self.chains.get(chain) if op.kind == WAIT else None)
            self.chains[chain] = node
            if op.kind == WAIT_SENT or not self.plan.fused:
                node.after(compute)
                self.streams[COMPUTE_STREAM] = node
        if op.kind in (SEND, POST):
            self.transfers.post(self.rank, message, node)
        return node, node


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
        prog="python -m megatron_mhc.pipeline.simulate",
        description=__doc__,
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    layout = parser.add_argument_group("layout")
    for name, (default, words) in LAYOUT.items():
        layout.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{words}; default {default}"
        )
    costs = parser.add_argument_group(
        "times, in milliseconds",
        "of one micro-batch on one rank; the defaults are the paper's 27B at assumed rates "
        "(400 TFLOP/s, 45 GB/s between ranks)",
    )
    for f in fields(Times):
        flag, words = "--" + f.name.replace("_", "-"), MEANINGS[f.name]
        if isinstance(f.default, bool):
            costs.add_argument(flag, action="store_true", help=words)
        else:
            kind, unit = (int, "N") if isinstance(f.default, int) else (float, "MS")
            costs.add_argument(
                flag, type=kind, default=f.default, metavar=unit, help=f"{words}; default {f.default}"
            )
    picture = parser.add_argument_group("picture")
    picture.add_argument(
        "--png", metavar="PATH", help="draw a timeline to this .png or .pdf; a missing folder is made"
    )
    picture.add_argument(
        "--draw",
        metavar="SCHEDULE",
        default="interleaved, split",
        help="schedule to draw, as the table names it; default %(default)r",
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
