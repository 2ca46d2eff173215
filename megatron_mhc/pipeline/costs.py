"""What the simulator is told: what operations and messages cost, and what they share; no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_mhc.schedule.program import (
    ALL,
    ALL_TO_ALL,
    BACKWARD,
    FORWARD,
    HEAD,
    NODES,
    REPLAY,
    SPLIT,
    TAIL,
    Message,
    Op,
    Plan,
)

# Kinds of phases. Kernels; something that only its own stream waits for; a copy over the rank's link, one way
# or both ways at once.
KERNEL, APART = "kernel", "apart"
OUT, IN, BOTH = "out", "in", "both"
# A number is copied to the host on a stream of its own, behind the phase before; the host waits for that.
REPORT, AWAIT = "report", "await"
LINKS = {OUT: (OUT,), IN: (IN,), BOTH: (OUT, IN), REPORT: (OUT,)}  # directions

# Whose copy a link takes next: all copies in turns, slice by slice; one copy to its end, then the one that
# was ready first; or, as a copy engine that stays with its stream, first what is ready on the last stream.
FAIR, COPY, STREAM = "fair", "copy", "stream"


class Phase(NamedTuple):
    """A part of a compute operation; parts run one after the other on the operation's stream.

    kind: see above.
    ms: how long it takes on the device, alone.
    host: milliseconds in which the host launches it.
    """

    kind: str
    ms: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What operations of one rank share, beside the order of their streams.

    Args:
        host: operations begin when the host has come to them; it goes through the program in order, takes
            its time for each, and waits where a phase says so. A receive is then posted when the host
            comes to it, and not when the compute stream does.
        late: with a host, receives are posted from the compute stream all the same.
        ahead: compute operations that the host can be ahead of the device; None for any number.
        kernels: kernels on several streams share one GPU, so that together they take no less time than
            one after the other.
        one_channel: a rank's messages go one after the other, each way, in the order that they are posted.
        turns: FAIR, COPY or STREAM.
        both_ways: how many times longer a copy takes while the link's other direction is busy.
        slice: milliseconds for which one copy or kernel has what it shares.
    """

    host: bool = False
    late: bool = False
    ahead: int | None = None
    kernels: bool = False
    one_channel: bool = False
    turns: str = FAIR
    both_ways: float = 1.0
    slice: float = 0.25

    def slices(self, ms: float) -> int:
        return max(1, round(ms / self.slice))

    def turn(self, copy: Hashable, stream: str) -> Hashable:
        """With whom a copy shares its turn; None: with none, not even itself."""
        return {FAIR: None, COPY: copy, STREAM: stream}[self.turns]


class Costs:
    """What `simulate` needs to know, of which `Times` is one form and a measurement another."""

    machine = Machine()

    def compute(self, plan: Plan, op: Op) -> float:
        """Milliseconds of a compute operation."""
        raise NotImplementedError

    def transfer(self, message: Message) -> tuple[float, int]:
        """(milliseconds, slices in which it shares a link) of a message."""
        raise NotImplementedError

    def phases(self, plan: Plan, op: Op) -> Sequence[Phase]:
        """A compute operation in parts; one, where the machine has it share nothing."""
        return [Phase(KERNEL, self.compute(plan, op))]

    def host(self, op: Op) -> float:
        """Milliseconds of the host for an operation that does not compute."""
        return 0.0


@dataclass(frozen=True)
class Times(Costs):
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
        shared_link: all-to-alls take both directions of the link that messages go over.
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
    shared_link: bool = False

    def without(self, *names: str) -> Times:
        return replace(self, **dict.fromkeys(names, 0.0))  # type: ignore[arg-type]

    def compute(self, plan: Plan, op: Op) -> float:
        """Duration of a compute operation; unfused, with the all-to-alls that nothing hides."""
        return sum(phase.ms for phase in self._parts(plan, op))

    def phases(self, plan: Plan, op: Op) -> Sequence[Phase]:
        return self._parts(plan, op) if self.shared_link else super().phases(plan, op)

    def _parts(self, plan: Plan, op: Op) -> list[Phase]:
        layers = plan.layers_of(op.stage)
        split, sends, receives = plan.boundary == SPLIT, op.stage < plan.stages - 1, op.stage > 0
        # Under the split boundary the stage that receives [f, h_post] runs the last post_res of the sender.
        enter = [Phase(KERNEL, self.post)] if split and receives else []
        exchange = Phase(BOTH, self.all_to_all)
        if op.kind == REPLAY:
            return [Phase(KERNEL, layers * self.replay)]
        if op.what in ALL_TO_ALL:
            return [exchange]
        forward = op.kind == FORWARD
        attention = Phase(KERNEL, self.attention if forward else self.attention_backward)
        experts = Phase(KERNEL, self.mlp if forward else self.mlp_backward)
        if op.what in NODES:
            post = Phase(KERNEL, self.post if forward else 0.0)
            node = {"attention": attention, "experts": experts, "post": post}[op.what]
            first = forward and op.what == "attention" and op.layer == 0
            return [*enter, node] if first else [node]
        mlp = [exchange, experts, exchange]
        if op.kind == BACKWARD:
            whole, tail = layers * [*mlp, attention], len(mlp)
            return {ALL: whole, TAIL: whole[:tail], HEAD: whole[tail:]}[op.what]
        whole = [*enter, *layers * [attention, *mlp, Phase(KERNEL, self.post)]]
        if split and sends:
            whole.pop()
        tail = len(whole) - len(mlp)
        return {ALL: whole, HEAD: whole[:tail], TAIL: whole[tail:]}[op.what]

    def transfer(self, message: Message) -> tuple[float, int]:
        if self.stream == 0:
            return 0.0, 1
        streams = 1 if message.name in ("write", "d_write") else self.streams
        return self.latency + streams * self.stream, streams
