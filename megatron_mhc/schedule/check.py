"""Verify programs without running them: order of messages, deadlock, chunks in flight; no torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mhc.schedule.lanes import InOrder, Lane, Track, in_order
from megatron_mhc.schedule.program import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    POST,
    SEND,
    WAIT,
    Message,
    Op,
    Plan,
    build_program,
    channel,
)


class Deadlock(ValueError):
    """Programs that wait for each other in a circle."""


def check_programs(plan: Plan, programs: list[list[Op]] | None = None) -> None:
    """Run the programs of all ranks without time and verify them.

    Args:
        programs: of ranks 0 to pp - 1; `build_program`'s where None.

    Raises:
        Deadlock: ranks that wait for each other; the message names where each stands.
        ValueError: the two ends of a channel disagree about the order of its messages; a message is
            sent before its part was computed, or used before it came; chunks in flight exceed
            `Plan.in_flight`.
    """
    programs = programs or [build_program(plan, rank) for rank in range(plan.pp)]
    _check_channels(plan, programs)
    for rank, program in enumerate(programs):
        if (peak := peak_in_flight(program)) > plan.in_flight(rank):
            raise ValueError(f"rank {rank} holds {peak} chunks, expected at most {plan.in_flight(rank)}")
    run = _Run(programs)
    run.go([len(program) for program in programs])
    ends = enumerate(zip(programs, run.at, strict=True))
    if stuck := [f"rank {rank} at {program[at]}" for rank, (program, at) in ends if at < len(program)]:
        raise Deadlock("; ".join(stuck))


def check_in_order(
    plan: Plan, programs: list[list[Op]] | None = None, slots: dict[Lane, int] | None = None
) -> None:
    """Verify programs whose every operation ends before its rank's next one starts, see `lanes.InOrder`.

    A SEND waits for a free slot of its lane and for nothing else. Whatever runs less strictly, on several
    streams, then ends too: an operation waits for nothing that stands behind it.

    Args:
        programs: of ranks 0 to pp - 1; `build_program`'s where None.
        slots: of each lane; `lanes.in_order`'s where None.

    Raises:
        Deadlock: ranks that wait for each other; the message names where each stands.
        ValueError: a lane's messages are not waited for in the order in which they are sent, or two would be
            in one slot at a time.
    """
    built = programs or [build_program(plan, rank) for rank in range(plan.pp)]
    run = InOrder(plan, built, slots) if slots else in_order(plan, built)
    if stuck := run.go():
        raise Deadlock("; ".join(f"rank {rank} at {built[rank][run.at[rank]]}" for rank in stuck))
    sent, waited = run.by_lane(SEND), run.by_lane(WAIT)
    if wrong := next((lane for lane in sent if sent[lane] != waited.get(lane)), None):
        raise ValueError(f"{wrong}: messages are waited for in another order than they are sent")
    for lane, track in run.tracks().items():
        check_slots(lane, track)


def check_slots(lane: Lane, track: Track) -> None:
    """Raise ValueError if a message would be written over one that the receiver has not let go of."""
    number = {message: at for at, message in enumerate(track.let_go)}
    last: dict[int, Message] = {}
    for at, (message, slot) in enumerate(zip(track.messages, track.places, strict=True)):
        if slot in last and number[last[slot]] > at - track.slots:
            raise ValueError(f"{lane}: {message} would overwrite {last[slot]}")
        last[slot] = message


def held_up(plan: Plan, programs: list[list[Op]] | None = None) -> Iterator[tuple[int, Op, list[Op]]]:
    """The messages that block where one rank's host stops in front of a compute operation.

    Yields:
        (rank, compute, pending): the rank's host waits for its device before launching `compute`, while all
        other ranks go on as far as they can; `pending` are POSTs and SENDs of that rank that do not finish.
    """
    programs = programs or [build_program(plan, rank) for rank in range(plan.pp)]
    for rank, program in enumerate(programs):
        run, limits = _Run(programs), [len(other) for other in programs]
        pending: list[Op] = []
        begin = 0
        for limits[rank], compute in enumerate(program):
            if compute.kind not in COMPUTE:
                continue
            run.go(limits)
            pending += [op for op in program[begin : limits[rank]] if op.kind in (POST, SEND)]
            pending = [op for op in pending if not run.arrived(op.message)]
            begin = limits[rank]
            if pending:
                yield rank, compute, list(pending)


class _Run:
    """Programs of all ranks that are run without time; `at`: the next operation of each."""

    def __init__(self, programs: list[list[Op]]):
        self.programs, self.at = programs, [0] * len(programs)
        self.sent: set[Message] = set()
        self.posted: set[Message] = set()

    def arrived(self, message: Message) -> bool:
        # Both ends keep one order, so a message has come once it was sent and its receive posted.
        return message in self.sent and message in self.posted

    def go(self, limits: list[int]) -> None:
        """Run every program as far as it can, but not the operations from its limit on."""
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(self.programs):
                while self.at[rank] < limits[rank]:
                    op = program[self.at[rank]]
                    if op.kind == WAIT and not self.arrived(op.message):
                        break
                    if op.kind in (SEND, POST):
                        (self.sent if op.kind == SEND else self.posted).add(op.message)
                    self.at[rank] += 1
                    moved = True


def _check_channels(plan: Plan, programs: list[list[Op]]) -> None:
    ends: dict[tuple[str, int, int], tuple[list[Message], list[Message]]] = {}
    for rank, program in enumerate(programs):
        waited, posted = [], []
        for op in program:
            if op.kind in COMPUTE:
                continue
            name, source, target = channel(plan, op.message)
            if rank != (source if op.kind == SEND else target):
                raise ValueError(f"{op} does not belong on rank {rank}")
            if op.kind == WAIT:
                waited.append(op.message)
                continue
            if op.kind == POST:
                posted.append(op.message)
            ends.setdefault((name, source, target), ([], []))[op.kind == POST].append(op.message)
        if sorted(waited) != sorted(posted):
            raise ValueError(f"rank {rank} does not wait once for each message that it receives")
    for (name, source, target), (sends, posts) in ends.items():
        if sends != posts:
            wrong = next((pair for pair in zip(sends, posts, strict=False) if pair[0] != pair[1]), None)
            raise ValueError(f"{name}, rank {source} to {target}: the ends disagree, first at {wrong}")


def chunk_events(program: list[Op]) -> Iterator[tuple[str, int, int]]:
    """(FORWARD or BACKWARD, microbatch, stage): forward where a chunk starts, backward where it ends."""
    last = {op[2:4]: at for at, op in enumerate(program) if op.kind == BACKWARD}
    begun: set[tuple[int, int]] = set()
    for at, op in enumerate(program):
        where = (op.microbatch, op.stage)
        if op.kind == FORWARD and where not in begun:
            begun.add(where)
            yield FORWARD, *where
        elif op.kind == BACKWARD and last[where] == at:
            yield BACKWARD, *where


def peak_in_flight(program: list[Op]) -> int:
    """Most chunks run forward and not yet backward; 1 where the program has no backward."""
    if not any(op.kind == BACKWARD for op in program):
        return 1
    now = peak = 0
    for kind, _, _ in chunk_events(program):
        now += 1 if kind == FORWARD else -1
        peak = max(peak, now)
    return peak
