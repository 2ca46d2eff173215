"""The order in which every pipeline rank computes, sends and receives, as data; no torch.

A model of `pp * vpp` stages lies on `pp` ranks in turn: stage = chunk * pp + rank. A program is one rank's
list of `Op`s; the engine runs it and the simulator times it. Between two stages there travel, under

    boundary   forward                                    backward
    whole      streams  x'                       [n*C]    d_streams  dx'                       [n*C]
    split      mixed    u = H_res x              [n*C]    d_write    df and dh_post            [C+n]
               write    f and h_post             [C+n]    d_streams  dx' = du                  [n*C]

x' = u + h_post^T f. Under `split`, u leaves before the stage's last MLP, which neither it nor h_post
depends on, and d_write is all that the backward of that MLP needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD, REPLAY = "forward", "backward", "replay"  # compute
POST, WAIT, SEND = "post", "wait", "send"  # post a receive, wait for a message, send a message
COMPUTE = (FORWARD, BACKWARD, REPLAY)

WHOLE, SPLIT = "whole", "split"
UP_MESSAGES = {WHOLE: ("streams",), SPLIT: ("mixed", "write")}  # in the order they are sent
DOWN_MESSAGES = {WHOLE: ("d_streams",), SPLIT: ("d_write", "d_streams")}

# Parts of a chunk's forward and backward. Unfused, a chunk runs as a whole, or under `split` in two parts
# on either side of its last MLP. Fused, every layer runs in nodes; `dispatch` and `combine` are the
# all-to-alls of MoE and empty in a dense layer, `post` is the post_res of the MLP.
ALL, HEAD, TAIL = "all", "head", "tail"
NODES = ("attention", "dispatch", "experts", "combine", "post")
ALL_TO_ALL = ("dispatch", "combine")


class Op(NamedTuple):
    """One step of a program.

    kind: FORWARD, BACKWARD, REPLAY, POST, WAIT or SEND.
    what: the part of the chunk that is computed, or the name of the message.
    microbatch: whose.
    stage: that computes, or that produces the message (so that both ends name it alike).
    layer: local layer of a fused node, else -1.
    """

    kind: str
    what: str
    microbatch: int
    stage: int
    layer: int = -1

    @property
    def message(self) -> Message:
        return Message(self.what, self.microbatch, self.stage)


class Message(NamedTuple):
    """What one stage sends to its neighbour: `d_*` to the stage before, others to the next one."""

    name: str
    microbatch: int
    stage: int

    @property
    def backward(self) -> bool:
        return self.name.startswith("d_")

    @property
    def receiver(self) -> int:
        """The stage that it goes to."""
        return self.stage - 1 if self.backward else self.stage + 1


class Step(NamedTuple):
    """Positions in the forward and backward order that are run together; None where one is absent."""

    forward: int | None
    backward: int | None


@dataclass(frozen=True)
class Plan:
    """The settings that programs follow from.

    Args:
        pp: pipeline ranks.
        vpp: model chunks on each rank.
        microbatches: of one step; any number.
        group: microbatches that a chunk runs in a row before the next chunk's turn (Megatron's
            microbatch_group_size_per_vp_stage); pp where None.
        boundary: WHOLE or SPLIT.
        forward_only: evaluation.
        fused: run a forward chunk and a backward chunk of two microbatches node by node in turns.
        replay: chunks recompute, and do so before they wait for the gradient.
        layers: layers of each stage (fused programs alone depend on them); one number for all of them.
        hops: forward chunks of warm-up for each rank that follows; 1 is Megatron's 1F1B without virtual
            stages, which leaves no time for a message.
        ahead: compute steps between posting a receive and using it. None: 2, but 1 where the message may
            follow from what the rank does in between: a fused step is two chunks, and of 2 ranks each is
            the other's neighbour on both sides. See loading.py.

    Raises:
        ValueError: a setting out of range.
    """

    pp: int
    vpp: int
    microbatches: int
    group: int | None = None
    boundary: str = WHOLE
    forward_only: bool = False
    fused: bool = False
    replay: bool = False
    layers: int | tuple[int, ...] = 1
    hops: int = 2
    ahead: int | None = None

    def __post_init__(self) -> None:
        for name in ("pp", "vpp", "microbatches", "hops", "ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if self.pp == 1 and self.vpp > 1:
            raise ValueError(f"vpp={self.vpp} needs at least 2 pipeline ranks")
        if self.boundary not in UP_MESSAGES:
            raise ValueError(f"boundary={self.boundary!r}: choose one of {', '.join(UP_MESSAGES)}")
        if self.group is not None and self.group < self.pp:
            raise ValueError(f"group={self.group}: give at least the {self.pp} pipeline ranks")
        if not isinstance(self.layers, int) and len(self.layers) != self.stages:
            raise ValueError(f"layers={self.layers}: give one number, or one per stage, {self.stages}")

    @property
    def stages(self) -> int:
        return self.pp * self.vpp

    @property
    def chunks(self) -> int:
        """Forward computations of one rank in one step."""
        return self.vpp * self.microbatches

    def layers_of(self, stage: int) -> int:
        return self.layers if isinstance(self.layers, int) else self.layers[stage]

    def groups(self) -> list[int]:
        """Sizes of the groups of microbatches that pass through one chunk in a row.

        Megatron's, but a remainder smaller than pp, which Megatron refuses, joins the last group: as a
        group of its own it would leave a rank idle while its microbatches go round the ring.
        """
        size = max(self.group or self.pp, self.pp)
        count, rest = divmod(self.microbatches, size)
        if count == 0:
            return [rest]
        sizes = [size] * count
        if rest >= self.pp:
            sizes.append(rest)
        else:
            sizes[-1] += rest
        return sizes

    def forward_order(self) -> list[tuple[int, int]]:
        """(microbatch, chunk) in the order that every rank runs their forward."""
        order, first = [], 0
        for size in self.groups():
            order += [(mb, chunk) for chunk in range(self.vpp) for mb in range(first, first + size)]
            first += size
        return order

    def backward_order(self) -> list[tuple[int, int]]:
        """(microbatch, chunk) in the order that every rank runs their backward."""
        return [(mb, self.vpp - 1 - chunk) for mb, chunk in self.forward_order()]

    def warmup(self, rank: int) -> int:
        """Forward chunks that a rank runs before its first backward."""
        if self.forward_only:
            return self.chunks
        # Fused, one more: the backward of a step must not need the forward beside it.
        warm = self.hops * (self.pp - 1 - rank) + (self.vpp - 1) * max(self.groups()) + self.fused
        return min(self.chunks, warm)

    def in_flight(self, rank: int) -> int:
        """Most chunks that a rank has run forward and not yet backward, at any time."""
        return 1 if self.forward_only else min(self.chunks, self.warmup(rank) + 1)

    def steps(self, rank: int) -> list[Step]:
        """Warm-up, steady state and cool-down of a rank."""
        warm, total = self.warmup(rank), self.chunks
        steps = [Step(i, None) for i in range(warm)]
        if self.forward_only:
            return steps
        for j in range(total - warm):
            both = Step(warm + j, j)
            steps += [both] if self.fused else [Step(both.forward, None), Step(None, both.backward)]
        return steps + [Step(None, j) for j in range(total - warm, total)]


def inputs(plan: Plan, microbatch: int, stage: int, backward: bool = False) -> list[Message]:
    """The messages that a stage's forward or backward of one microbatch waits for, in that order."""
    source = stage + 1 if backward else stage - 1
    if not 0 <= source < plan.stages:
        return []
    names = (DOWN_MESSAGES if backward else UP_MESSAGES)[plan.boundary]
    return [Message(name, microbatch, source) for name in names]


def outputs(plan: Plan, microbatch: int, stage: int, backward: bool = False) -> list[Message]:
    """The messages that a stage's forward or backward of one microbatch sends, in that order."""
    if stage == (0 if backward else plan.stages - 1):
        return []
    names = (DOWN_MESSAGES if backward else UP_MESSAGES)[plan.boundary]
    return [Message(name, microbatch, stage) for name in names]


def build_program(plan: Plan, rank: int) -> list[Op]:
    """The program of one rank.

    Raises:
        ValueError: a rank outside the pipeline.
    """
    if not 0 <= rank < plan.pp:
        raise ValueError(f"rank={rank}: give 0 to {plan.pp - 1}")
    forward, backward = plan.forward_order(), plan.backward_order()
    steps = plan.steps(rank)

    def place(order: list[tuple[int, int]], position: int) -> tuple[int, int]:
        microbatch, chunk = order[position]
        return microbatch, chunk * plan.pp + rank

    def needs(step: Step) -> list[Message]:
        up = [] if step.forward is None else inputs(plan, *place(forward, step.forward))
        down = [] if step.backward is None else inputs(plan, *place(backward, step.backward), backward=True)
        return up + down

    program: list[Op] = []
    ahead = plan.ahead or (1 if plan.fused or plan.pp == 2 else 2)
    posted = 0
    for at, step in enumerate(steps):
        for later in steps[posted : at + ahead + 1]:
            program += _ops(POST, needs(later))
        posted = max(posted, at + ahead + 1)
        up = None if step.forward is None else place(forward, step.forward)
        down = None if step.backward is None else place(backward, step.backward)
        if plan.fused:
            program += _fused(plan, up, down)
        elif up is not None:
            program += _forward(plan, *up)
        elif down is not None:
            program += _backward(plan, *down)
    return program


def _ops(kind: str, messages: list[Message]) -> list[Op]:
    return [Op(kind, *message) for message in messages]


def _forward(plan: Plan, microbatch: int, stage: int) -> list[Op]:
    waits = _ops(WAIT, inputs(plan, microbatch, stage))
    sends = _ops(SEND, outputs(plan, microbatch, stage))
    if len(sends) < 2:  # whole, or the last stage
        return [*waits, Op(FORWARD, ALL, microbatch, stage), *sends]
    head, tail = Op(FORWARD, HEAD, microbatch, stage), Op(FORWARD, TAIL, microbatch, stage)
    return [*waits, head, sends[0], tail, sends[1]]


def _backward(plan: Plan, microbatch: int, stage: int) -> list[Op]:
    waits = _ops(WAIT, inputs(plan, microbatch, stage, backward=True))
    sends = _ops(SEND, outputs(plan, microbatch, stage, backward=True))
    replay = [Op(REPLAY, ALL, microbatch, stage)] if plan.replay else []
    if len(waits) < 2:
        return [*replay, *waits, Op(BACKWARD, ALL, microbatch, stage), *sends]
    tail, head = Op(BACKWARD, TAIL, microbatch, stage), Op(BACKWARD, HEAD, microbatch, stage)
    return [*replay, waits[0], tail, waits[1], head, *sends]


def _fused(plan: Plan, up: tuple[int, int] | None, down: tuple[int, int] | None) -> list[Op]:
    """One step, node by node: while one microbatch is in an all-to-all, the other computes.

    `up` and `down` are the (microbatch, stage) of the forward and of the backward chunk.
    """
    ops: list[Op] = []
    rising: list[dict[str, list[Op]]] = []
    falling: list[dict[str, list[Op]]] = []
    if down is not None:
        ops += [Op(REPLAY, ALL, *down)] if plan.replay else []
        falling = [_layer_backward(plan, *down, at) for at in reversed(range(plan.layers_of(down[1])))]
    if up is not None:
        ops += _ops(WAIT, inputs(plan, *up))
        rising = [_layer_forward(plan, *up, at) for at in range(plan.layers_of(up[1]))]
    for at in range(max(len(rising), len(falling))):
        f = rising[at] if at < len(rising) else {}
        b = falling[at] if at < len(falling) else {}
        for direction, node in (
            (b, "post"),
            (b, "combine"),
            (f, "attention"),
            (f, "dispatch"),
            (b, "experts"),
            (b, "dispatch"),
            (f, "experts"),
            (f, "combine"),
            (f, "post"),  # on the high-priority stream, ahead of the attention it must not wait for
            (b, "attention"),
        ):
            ops += direction.get(node, [])
    return ops


def _layer_forward(plan: Plan, microbatch: int, stage: int, layer: int) -> dict[str, list[Op]]:
    nodes = {node: [Op(FORWARD, node, microbatch, stage, layer)] for node in NODES}
    sends = _ops(SEND, outputs(plan, microbatch, stage))
    if layer == plan.layers_of(stage) - 1 and sends:
        if len(sends) == 2:
            nodes["attention"].append(sends[0])
            nodes["combine"].append(sends[1])
            del nodes["post"]  # the next stage does it
        else:
            nodes["post"].append(sends[0])
    return nodes


def _layer_backward(plan: Plan, microbatch: int, stage: int, layer: int) -> dict[str, list[Op]]:
    nodes = {node: [Op(BACKWARD, node, microbatch, stage, layer)] for node in NODES}
    waits = _ops(WAIT, inputs(plan, microbatch, stage, backward=True))
    if layer == plan.layers_of(stage) - 1 and waits:
        if len(waits) == 2:
            del nodes["post"]
            nodes["combine"].insert(0, waits[0])
            nodes["attention"].insert(0, waits[1])
        else:
            nodes["post"].insert(0, waits[0])
    if layer == 0:
        nodes["attention"] += _ops(SEND, outputs(plan, microbatch, stage, backward=True))
    return nodes


def channel(plan: Plan, message: Message) -> tuple[str, int, int]:
    """(name of the process group, sending rank, receiving rank) of a message.

    Messages of one channel arrive in the order they are sent. Forward and backward have groups of their
    own, and so have the two directions between two ranks that are each other's neighbour on both sides:
    sharing one, a send could queue behind a receive that waits for that very send's receiver.
    """
    source, target = message.stage % plan.pp, message.receiver % plan.pp
    name = "backward" if message.backward else "forward"
    if plan.pp == 2 and (source > target) != message.backward:
        name += "_wrap"
    return name, source, target
