"""The memory that messages are received into, where the receiver has slots for them; no torch.

A lane is what one rank sends to another under one name; its messages keep one order. Of the slots that a
lane has, a message gets the one that the receiver lets go of first. Both ends follow that from the
receiver's program, so no message says where it lies: the k-th (from 0) of a step may be written as soon as
the receiver has let go of k + 1 - slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
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
    inputs,
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


def held(plan: Plan, program: list[Op]) -> dict[Lane, int]:
    """Most messages of each lane that a receiver has waited for and not let go of."""
    now: dict[Lane, int] = defaultdict(int)
    most: dict[Lane, int] = defaultdict(int)
    ends = let_go(plan, program)
    for at, op in enumerate(program):
        if op.kind == WAIT:
            lane = lane_of(plan, op.message)
            now[lane] += 1
            most[lane] = max(most[lane], now[lane])
        for message in ends.get(at, ()):
            now[lane_of(plan, message)] -= 1
    return most


class InOrder:
    """Programs of which every operation ends before its rank's next one starts; `at`: the next of each.

    A WAIT ends once the message was sent, a SEND once its lane has a free slot: so they stand where all
    streams of a rank share one hardware queue, or where a host waits for its device.
    """

    def __init__(self, plan: Plan, programs: list[list[Op]], slots: dict[Lane, int]):
        self.plan, self.programs, self.slots = plan, programs, slots
        self.at = [0] * len(programs)
        self.ends = [let_go(plan, program) for program in programs]
        self.sent: set[Message] = set()
        self.used: dict[Lane, int] = defaultdict(int)

    def blocked(self, rank: int) -> bool:
        op = self.programs[rank][self.at[rank]]
        if op.kind == WAIT:
            return op.message not in self.sent
        return op.kind == SEND and self.used[lane_of(self.plan, op.message)] >= self._count(op)

    def _count(self, op: Op) -> int:
        return self.slots.get(lane_of(self.plan, op.message), 1)

    def go(self) -> list[int]:
        """Run as far as possible; returns the ranks that stand still before their end."""
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(self.programs):
                while self.at[rank] < len(program) and not self.blocked(rank):
                    op = program[self.at[rank]]
                    if op.kind == SEND:
                        self.sent.add(op.message)
                        self.used[lane_of(self.plan, op.message)] += 1
                    for message in self.ends[rank].get(self.at[rank], ()):
                        self.used[lane_of(self.plan, message)] -= 1
                    self.at[rank] += 1
                    moved = True
        return [rank for rank, program in enumerate(self.programs) if self.at[rank] < len(program)]


def slots_for(plan: Plan, programs: list[list[Op]]) -> dict[Lane, int]:
    """Slots of each lane: what its receiver holds, and AHEAD; more where a send would wait for ever."""
    slots = {lane: most + AHEAD for program in programs for lane, most in held(plan, program).items()}
    run = InOrder(plan, programs, slots)
    while stuck := run.go():
        ops = [programs[rank][run.at[rank]] for rank in stuck]
        full = [lane_of(plan, op.message) for op in ops if op.kind == SEND]
        if not full:
            break  # no slot would help: `check.check_in_order` names it
        for lane in full:
            slots[lane] += 1
    return slots


@lru_cache(maxsize=8)
def tracks(plan: Plan) -> dict[Lane, Track]:
    """Every lane that a plan's programs use."""
    programs = [build_program(plan, rank) for rank in range(plan.pp)]
    slots = slots_for(plan, programs)
    sent: dict[Lane, list[Message]] = defaultdict(list)
    done: dict[Lane, list[Message]] = defaultdict(list)
    for program in programs:
        for op in program:
            if op.kind == SEND:
                sent[lane_of(plan, op.message)].append(op.message)
        ends = let_go(plan, program)
        for at in sorted(ends):
            for message in ends[at]:
                done[lane_of(plan, message)].append(message)
    return {lane: _track(sent[lane], done[lane], slots[lane]) for lane in sorted(slots)}


def _track(messages: list[Message], done: list[Message], slots: int) -> Track:
    places: dict[Message, int] = {}
    for number, message in enumerate(messages):
        places[message] = number if number < slots else places[done[number - slots]]
    return Track(tuple(messages), tuple(places[m] for m in messages), tuple(done), slots)


def overwritten(plan: Plan, track: Track, programs: list[list[Op]]) -> Iterator[tuple[Message, Message]]:
    """(earlier, later) messages of a lane that would share a slot at a time; none, unless `track` is wrong."""
    released = {message: number for number, message in enumerate(track.let_go)}
    last: dict[int, Message] = {}
    for number, (message, place) in enumerate(zip(track.messages, track.places, strict=True)):
        if place in last and released[last[place]] > number - track.slots:
            yield last[place], message
        last[place] = message
