"""The memory that messages are received into, where the receiver has slots for them; no torch.

A lane is what one rank sends to another under one name; its messages keep one order. Of the slots that a
lane has, a message gets the one that the receiver lets go of first. Both ends follow that from the
receiver's program, so no message says where it lies: the k-th (from 0) of a step may be written as soon as
the receiver has let go of k + 1 - slots.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_mhc.schedule.program import (
    BACKWARD,
    FORWARD,
    SEND,
    WAIT,
    Message,
    Op,
    Plan,
    build_program,
)

AHEAD = 2  # messages of a lane that may arrive while the receiver holds as many as it needs
NARROW = ("write", "d_write")  # copied out of their slot as soon as they are waited for
NAMES = ("streams", "mixed", "write", "d_streams", "d_write")


class Lane(NamedTuple):
    """Messages of one name from one rank to another."""

    source: int
    target: int
    name: str


@dataclass(frozen=True)
class Track:
    """The messages of a lane in one step.

    messages: in the order in which they are sent and waited for.
    places: the slot of each.
    let_go: in the order in which the receiver is done with them.
    slots: how many there are.
    """

    messages: tuple[Message, ...]
    places: tuple[int, ...]
    let_go: tuple[Message, ...]
    slots: int


def lane_of(plan: Plan, message: Message) -> Lane:
    return Lane(message.stage % plan.pp, message.receiver % plan.pp, message.name)


def all_lanes(pp: int) -> list[Lane]:
    """Every lane of a ring of so many ranks, in one order on all of them."""
    ends = {(rank, (rank + way) % pp) for rank in range(pp) for way in (1, -1)}
    return [Lane(*pair, name) for pair in sorted(ends) for name in NAMES]


def let_go(plan: Plan, program: list[Op]) -> dict[int, list[Message]]:
    """The messages that a rank is done with at each operation, by its number in the program.

    Narrow messages at their WAIT, mixed streams where the forward begins, streams at the end of the backward
    that they are saved for (of the forward in evaluation), gradients at the end of the backward.
    """
    first: dict[tuple[str, int, int], int] = {}
    last: dict[tuple[str, int, int], int] = {}
    for at, op in enumerate(program):
        if op.kind in (FORWARD, BACKWARD):
            where = (op.kind, op.microbatch, op.stage)
            first.setdefault(where, at)
            last[where] = at
    ends: dict[int, list[Message]] = defaultdict(list)
    for at, op in enumerate(program):
        if op.kind != WAIT:
            continue
        message, here = op.message, (op.microbatch, op.message.receiver)
        if message.name in NARROW:
            ends[at].append(message)
        elif message.name == "mixed":
            ends[first[FORWARD, *here]].append(message)
        else:
            trains = message.backward or not plan.forward_only
            ends[last[BACKWARD if trains else FORWARD, *here]].append(message)
    return ends


class InOrder:
    """Programs of which every operation ends before its rank's next one starts; `at`: the next of each.

    A WAIT ends once the message was sent, a SEND once its lane has a free slot: so they stand where all
    streams of a rank share one hardware queue, or where a host waits for its device.
    """

    def __init__(self, plan: Plan, programs: list[list[Op]], slots: dict[Lane, int]):
        self.programs, self.slots = programs, slots
        self.at = [0] * len(programs)
        self.sent: set[Message] = set()
        self.used: dict[Lane, int] = defaultdict(int)
        # Of each operation: (message that it waits for, message that it sends, messages that it lets go of).
        self._does: list[list[tuple[Message | None, Message | None, list[Message]]]] = []
        self._lanes: dict[Message, Lane] = {}
        for program in programs:
            ends = let_go(plan, program)
            does: list[tuple[Message | None, Message | None, list[Message]]] = []
            for at, op in enumerate(program):
                message = op.message if op.kind in (SEND, WAIT) else None
                if message is not None:
                    self._lanes[message] = lane_of(plan, message)
                waits, sends = (message if op.kind == kind else None for kind in (WAIT, SEND))
                does.append((waits, sends, ends.get(at, [])))
            self._does.append(does)

    def held(self) -> dict[Lane, int]:
        """Most messages of each lane that its receiver has waited for and not let go of."""
        most: dict[Lane, int] = defaultdict(int)
        now: dict[Lane, int] = defaultdict(int)
        for does in self._does:
            for waits, _, done in does:
                if waits is not None:
                    lane = self._lanes[waits]
                    now[lane] += 1
                    most[lane] = max(most[lane], now[lane])
                for message in done:
                    now[self._lanes[message]] -= 1
        return most

    def by_lane(self, kind: str) -> dict[Lane, tuple[Message, ...]]:
        """The messages of each lane, in the order of the SENDs or of the WAITs.

        Without a kind: in the order in which the receiver lets go of them.
        """
        found: dict[Lane, list[Message]] = defaultdict(list)
        for does in self._does:
            for waits, sends, done in does:
                one = sends if kind == SEND else waits if kind == WAIT else None
                for message in done if not kind else [one] if one else []:
                    found[self._lanes[message]].append(message)
        return {lane: tuple(messages) for lane, messages in found.items()}

    def tracks(self) -> dict[Lane, Track]:
        """Every lane, with its slots."""
        sent, done = self.by_lane(SEND), self.by_lane("")
        return {lane: _track(sent[lane], done[lane], self.slots[lane]) for lane in sorted(self.slots)}

    def go(self) -> list[int]:
        """Run as far as possible; returns the ranks that stand still before their end."""
        moved = True
        while moved:
            moved = False
            for rank, does in enumerate(self._does):
                for at in range(self.at[rank], len(does)):
                    waits, sends, done = does[at]
                    if waits is not None and waits not in self.sent:
                        break
                    if sends is not None:
                        lane = self._lanes[sends]
                        if self.used[lane] >= self.slots.get(lane, 1):
                            break
                        self.sent.add(sends)
                        self.used[lane] += 1
                    for message in done:
                        self.used[self._lanes[message]] -= 1
                    self.at[rank] = at + 1
                    moved = True
        return [rank for rank, does in enumerate(self._does) if self.at[rank] < len(does)]


def in_order(plan: Plan, programs: list[list[Op]]) -> InOrder:
    """The programs as they end with `slots`: of each lane what its receiver holds, and AHEAD.

    More where a send would wait for ever; programs that do not end even so stand still.
    """
    run = InOrder(plan, programs, {})
    run.slots = {lane: most + AHEAD for lane, most in run.held().items()}
    while stuck := run.go():
        ops = [programs[rank][run.at[rank]] for rank in stuck]
        full = [lane_of(plan, op.message) for op in ops if op.kind == SEND]
        if not full:
            break
        for lane in full:
            run.slots[lane] += 1
    return run


@lru_cache(maxsize=8)
def tracks(plan: Plan) -> dict[Lane, Track]:
    """Every lane that a plan's programs use."""
    return in_order(plan, [build_program(plan, rank) for rank in range(plan.pp)]).tracks()


def _track(messages: tuple[Message, ...], done: tuple[Message, ...], slots: int) -> Track:
    places: dict[Message, int] = {}
    for number, message in enumerate(messages):
        places[message] = number if number < slots else places[done[number - slots]]
    return Track(messages, tuple(places[m] for m in messages), done, slots)
