"""Messages that the sender pushes into the receiver's memory: no receive is posted, nothing waits on an SM.

    send     side stream: wait for the data, and for a free slot; copy; set the lane's count at the receiver
    wait     the current stream waits for that count; the slot is the tensor
    release  side stream, behind the current one: set the count of free slots at the sender

The sender writes a message's number into its slot once it is whole. The receiver notes which one is there
when it has waited for a message and when it lets go of it; at the end of the step its host compares.

`schedule.lanes` says which slot, and why that cannot deadlock with one hardware queue either.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mhc.pipeline.memory import WRAP, Memory, Silent, reached
from megatron_mhc.pipeline.transport import PipelineError, Transport, about, silent
from megatron_mhc.pipeline.watchdog import Awaited, Watchdog
from megatron_mhc.schedule.lanes import NARROW, Lane, Track, all_lanes, tracks
from megatron_mhc.schedule.program import Message, Plan, channel

LINE = 128  # bytes between two counts
BESIDE = "beside"  # the stream of what a receiver notes and gives back
HEAD = 256  # bytes in front of a slot's payload: the count of the message that is in it

Shapes = dict[str, tuple[int, ...]]


class Room(NamedTuple):
    """The slots of one lane."""

    slots: int
    bytes: int

    @property
    def stride(self) -> int:
        return HEAD + -(-self.bytes // HEAD) * HEAD

    def join(self, other: Room) -> Room:
        return Room(max(self.slots, other.slots), max(self.bytes, other.bytes))


class Places:
    """Where everything lies in the memory of each rank: counts first, then the slots of its lanes."""

    def __init__(self, pp: int, rooms: dict[Lane, Room]):
        self.rooms = rooms
        self.index = {lane: number for number, lane in enumerate(all_lanes(pp))}
        first = -(-2 * len(self.index) * LINE // HEAD) * HEAD
        ends = [first] * pp
        self._starts: dict[Lane, int] = {}
        for lane, room in sorted(rooms.items()):
            self._starts[lane] = ends[lane.target]
            ends[lane.target] += room.slots * room.stride
        self.size = max(ends)

    def arrived(self, lane: Lane) -> int:
        """The count of messages that came, at the receiver."""
        return 2 * self.index[lane] * LINE

    def freed(self, lane: Lane) -> int:
        """The count of messages that the receiver let go of, at the sender."""
        return self.arrived(lane) + LINE

    def slot(self, lane: Lane, number: int) -> int:
        """The count of the message in a slot, at the receiver; its payload is HEAD further."""
        return self._starts[lane] + number * self.rooms[lane].stride

    # Notes of a device for its host: how far each lane is at either end, and what was in a slot.

    def came(self, lane: Lane) -> int:
        return 2 * self.index[lane]

    def left(self, lane: Lane) -> int:
        return 2 * self.index[lane] + 1

    @property
    def log(self) -> int:
        return 2 * len(self.index)


@dataclass(frozen=True)
class Kind:
    """What the ranks of a pipeline agree on before a step of a kind that is new."""

    plan: Plan
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype


class Pool:
    """Slots and counts of one pipeline, which live from step to step.

    Args:
        group: the pipeline's process group.
        make: (bytes of a rank, notes) -> memory; called by all ranks at the same time.
    """

    def __init__(self, group: Any, timeout: timedelta, make: Callable[[int, int], Memory]):
        self._group, self.timeout, self._make = group, timeout, make
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.rank: int = group.rank()
        self.places = Places(len(self.ranks), {})
        self._known: set[Kind] = set()
        self._notes = 0
        self.failed: str | None = None
        self._memory: Memory | None = None
        self.watchdog: Watchdog | None = None
        self.counts: Counter[Lane] = Counter()  # messages of all steps that are over

    @property
    def memory(self) -> Memory:
        assert self._memory is not None
        return self._memory

    def prepare(self, plan: Plan, shapes: Shapes, dtype: torch.dtype) -> None:
        """Have slots for a step; all ranks together, and together more memory where a kind needs it.

        Raises:
            ValueError: the ranks disagree about the step.
            PipelineError: an earlier step failed.
        """
        self.check()
        kind = Kind(plan, tuple(sorted(shapes.items())), dtype)
        if kind in self._known:
            return
        kinds: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(kinds, kind, group=self._group)
        if other := next((k for k in kinds if k != kind), None):
            raise ValueError(
                f"pipeline rank {self.rank} begins a step of {kind}, another rank one of {other}: every "
                "stage needs the same micro-batches, sequence length, micro-batch size, "
                "--mhc-num-residual-streams and pipeline dtype"
            )
        used = tracks(plan)
        rooms, notes = dict(self.places.rooms), 0
        for lane, track in used.items():
            need = Room(track.slots, _bytes(shapes[lane.name], dtype))
            rooms[lane] = rooms[lane].join(need) if lane in rooms else need
            notes += 2 * len(track.messages) if self.rank == lane.target else 0
        # A whole step's words are read at its end; ranks receive differently many.
        most: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(most, notes, group=self._group)
        if rooms != self.places.rooms or max(most) > self._notes:
            self._grow(rooms, max(self._notes, *most))
        self._known.add(kind)

    def _grow(self, rooms: dict[Lane, Room], notes: int) -> None:
        self.close()
        dist.barrier(group=self._group)  # until all have let go of the memory that was there
        self.places, self._notes, self.counts = Places(len(self.ranks), rooms), notes, Counter()
        memory = self._memory = self._make(self.places.size, self.places.log + notes)
        seconds = self.timeout.total_seconds()
        self.watchdog = Watchdog(memory.noted, reached, seconds, self.let_go)
        dist.barrier(group=self._group)  # nobody writes what another has not cleared

    def expect(self, index: int, value: int, said: str) -> None:
        if self.watchdog is not None and self.memory.pends:
            self.watchdog.expect(Awaited(index, value, said))

    def check(self) -> None:
        """Raise PipelineError if a wait failed."""
        if self.watchdog is not None and self.watchdog.failed:
            self.failed = self.watchdog.failed
        if self.failed:
            raise PipelineError(self.failed)

    def let_go(self) -> None:
        """End the waits of this rank's device by writing its own counts; no step can follow."""
        with self.memory.aside():
            for lane in self.places.index:
                ahead = self.counts[lane] + WRAP // 4
                if lane.target == self.rank:
                    self.memory.put(self.rank, self.places.arrived(lane), ahead)
                if lane.source == self.rank:
                    self.memory.put(self.rank, self.places.freed(lane), ahead)

    def close(self) -> None:
        """Let go of the memory."""
        if self.watchdog is not None:
            self.watchdog.stop()
        self.watchdog = self._memory = None


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


class Place(NamedTuple):
    """A message's lane, its number there in this step, and its slot."""

    lane: Lane
    number: int
    slot: int


@lru_cache(maxsize=8)
def _places(plan: Plan, rank: int) -> dict[Message, Place]:
    """Those of all messages that a rank sends or receives."""
    found = {}
    for lane, track in tracks(plan).items():
        if rank in lane[:2]:
            for number, (message, slot) in enumerate(zip(track.messages, track.places, strict=True)):
                found[message] = Place(lane, number, slot)
    return found


class PushTransport(Transport):
    """Pushes of one rank in one step, see `Transport`."""

    def __init__(self, plan: Plan, rank: int, pool: Pool, *how: Any):
        super().__init__(plan, rank, *how)
        self.pool = pool
        pool.prepare(plan, self.shapes, self.dtype)
        self.tracks: dict[Lane, Track] = tracks(plan)
        self.at = _places(plan, rank)
        self.done: Counter[tuple[Lane, str]] = Counter()
        self.logged: list[tuple[Message, str, int]] = []  # what must have been in its slot
        self.leaving: deque[tuple[Any, Tensor]] = deque()

    def post(self, message: Message) -> None:
        pass

    def _next(self, message: Message, what: str) -> Place:
        """Where a message lies, the next of its lane to be sent, waited for or let go of."""
        place = self.at[message]
        order = self.tracks[place.lane]
        number = self.done[place.lane, what]
        self.done[place.lane, what] += 1
        expected = (order.let_go if what == "freed" else order.messages)[number]
        if expected != message:
            raise RuntimeError(f"{what} of {message} where the program has that of {expected}")
        return place

    def wait(self, message: Message) -> Tensor:
        self.pool.check()
        lane, number, slot = self._next(message, "arrived")
        memory, places, value = self.pool.memory, self.pool.places, self.pool.counts[lane] + number + 1
        said = self._said(message, "did not come", lane.source)
        try:
            memory.until(places.arrived(lane), value)
        except Silent:
            raise PipelineError(said) from None
        with memory.behind(BESIDE):
            memory.note(places.came(lane), value)
            self._log(message, "came too early or too late", places.slot(lane, slot), value)
        self.pool.expect(places.came(lane), value, said)
        shape = self.shapes[message.name]
        tensor = memory.tensor(places.slot(lane, slot) + HEAD, shape, self.dtype)
        if message.name in NARROW:
            tensor = tensor.clone()
            self.release(message)
        return tensor

    def send(self, message: Message, tensor: Tensor) -> None:
        self.pool.check()
        tensor = self.checked(message, tensor)
        memory, places = self.pool.memory, self.pool.places
        lane, number, slot = self._next(message, "left")
        base, at = self.pool.counts[lane], places.slot(lane, slot)
        said = self._said(message, "was not received", lane.target)
        free = base + max(0, number + 1 - self.tracks[lane].slots)
        with memory.behind(channel(self.plan, message)[0]):
            try:
                memory.until(places.freed(lane), free)
            except Silent:
                raise PipelineError(said) from None
            memory.put(lane.target, at, ~(base + number + 1))  # no message is whole here meanwhile
            memory.copy(lane.target, at + HEAD, tensor)
            memory.put(lane.target, at, base + number + 1)
            memory.put(lane.target, places.arrived(lane), base + number + 1)
            memory.note(places.left(lane), base + number + 1)
            self.leaving.append((memory.event(), tensor))
        self.pool.expect(places.left(lane), base + number + 1, said)

    def release(self, message: Message) -> None:
        lane, number, slot = self._next(message, "freed")
        memory, places = self.pool.memory, self.pool.places
        freed = self.pool.counts[lane] + self.done[lane, "freed"]
        with memory.behind(BESIDE):
            value = self.pool.counts[lane] + number + 1
            self._log(message, "was overwritten while it was in use", places.slot(lane, slot), value)
            memory.put(lane.source, places.freed(lane), freed)

    def _log(self, message: Message, wrong: str, offset: int, value: int) -> None:
        """Note which message is in a slot; `wrong` is what is said at the step's end if it is another."""
        self.pool.memory.note_word(self.pool.places.log + len(self.logged), offset)
        self.logged.append((message, wrong, value))

    def kept(self, tensor: Tensor) -> Tensor:
        # A stage without layers hands on what it got.
        return tensor.clone() if self.pool.memory.holds(tensor) else tensor

    def sweep(self) -> None:
        while self.leaving and self.leaving[0][0].query():
            self.leaving.popleft()

    def drain(self) -> None:
        memory = self.pool.memory
        memory.finish(self.pool.check)
        self.leaving.clear()
        words = memory.noted_from(self.pool.places.log, len(self.logged))
        for found, (message, wrong, value) in zip(words, self.logged, strict=True):
            if found != value % WRAP:
                said = about(self.rank, message, wrong)
                self.pool.failed = f"{said}: its slot holds message {found} of its lane, not {value % WRAP}"
                self.pool.check()
        for lane, track in self.tracks.items():
            self.pool.counts[lane] += len(track.messages)

    def abandon(self) -> None:
        if self.pool.failed is None:
            self.pool.failed = "an earlier step failed, and its messages with it: start the job again"
        self.leaving.clear()
        self.pool.let_go()
        self.pool.memory.give_up()

    def _said(self, message: Message, what: str, peer: int) -> str:
        return f"{about(self.rank, message, what)}: {silent(self.pool.ranks, peer, self.pool.timeout)}"
