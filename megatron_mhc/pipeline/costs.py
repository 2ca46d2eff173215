"""What the simulator is told: how long operations and messages take; no torch."""

from __future__ import annotations

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

SLICE = 0.25  # milliseconds for which an all-to-all has a link before others take their turn


class Phase(NamedTuple):
    """A part of a compute operation; parts run one after the other on the operation's stream.

    ms: how long it takes alone.
    link: whether it takes both ways of the rank's link, and no time of the GPU.
    """

    ms: float
    link: bool = False

    @property
    def slices(self) -> int:
        return max(1, round(self.ms / SLICE))


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

    def phases(self, plan: Plan, op: Op) -> list[Phase]:
        """A compute operation in parts; one, where all-to-alls share no link."""
        return self._parts(plan, op) if self.shared_link else [Phase(self.compute(plan, op))]

    def _parts(self, plan: Plan, op: Op) -> list[Phase]:
        layers = plan.layers_of(op.stage)
        split, sends, receives = plan.boundary == SPLIT, op.stage < plan.stages - 1, op.stage > 0
        # Under the split boundary the stage that receives [f, h_post] runs the last post_res of the sender.
        enter = [Phase(self.post)] if split and receives else []
        exchange = Phase(self.all_to_all, link=True)
        if op.kind == REPLAY:
            return [Phase(layers * self.replay)]
        if op.what in ALL_TO_ALL:
            return [exchange]
        forward = op.kind == FORWARD
        attention = Phase(self.attention if forward else self.attention_backward)
        experts = Phase(self.mlp if forward else self.mlp_backward)
        if op.what in NODES:
            post = Phase(self.post if forward else 0.0)
            node = {"attention": attention, "experts": experts, "post": post}[op.what]
            first = forward and op.what == "attention" and op.layer == 0
            return [*enter, node] if first else [node]
        mlp = [exchange, experts, exchange]
        if op.kind == BACKWARD:
            whole, tail = layers * [*mlp, attention], len(mlp)
            return {ALL: whole, TAIL: whole[:tail], HEAD: whole[tail:]}[op.what]
        whole = [*enter, *layers * [attention, *mlp, Phase(self.post)]]
        if split and sends:
            whole.pop()
        tail = len(whole) - len(mlp)
        return {ALL: whole, HEAD: whole[:tail], TAIL: whole[tail:]}[op.what]

    def transfer(self, message: Message) -> tuple[float, int]:
        """(milliseconds, slices in which it shares a link) of a message."""
        if self.stream == 0:
            return 0.0, 1
        streams = 1 if message.name in ("write", "d_write") else self.streams
        return self.latency + streams * self.stream, streams
