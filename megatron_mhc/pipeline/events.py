"""Things that happen one after the other, and those of them that take turns at what they share; no torch."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field

Resource = tuple[str, int]  # what of which rank
OPPOSITE = {"out": "in", "in": "out"}  # directions of a link


@dataclass(eq=False)
class Node:
    """Something that happens once all its predecessors have: an operation or a transfer.

    Args:
        duration: of each of its slices.
        uses: what it needs for itself during a slice.
        turn: what it shares a turn with, as `Machine.turn` has it.
        urgent: it goes before what is not.
    """

    duration: float
    missing: int = 0
    then: list[Node] = field(default_factory=list)
    uses: tuple[Resource, ...] = ()
    slices: int = 1
    turn: Hashable = None
    urgent: bool = False
    start: float = -1.0
    end: float = -1.0
    left: int = 0

    def after(self, *earlier: Node | None) -> Node:
        for node in earlier:
            if node is not None:
                node.then.append(self)
                self.missing += 1
        return self


def run(nodes: list[Node], both_ways: float = 1.0) -> float:
    """Set every node's start and end; returns the time of the last end. What waits for itself never starts.

    Args:
        both_ways: how many times longer a slice takes while the other direction of its link is busy.
    """
    now, count = 0.0, 0
    done: list[tuple[float, int, Node]] = []
    queue: list[Node] = []  # what waits for what it uses
    busy: set[Resource] = set()
    latest: dict[Resource, Hashable] = {}  # whose turn it was

    def begin(node: Node) -> None:
        if node.start < 0:
            node.start, node.left = now, node.slices
        if node.uses:
            queue.append(node)
        else:
            finish(node, node.duration)

    def finish(node: Node, duration: float) -> None:
        nonlocal count
        count += 1
        heapq.heappush(done, (now + duration, count, node))

    def order(node: Node) -> tuple[bool, bool]:
        stays = node.turn is not None and all(latest.get(use) == node.turn for use in node.uses)
        return not node.urgent, not stays

    def serve() -> None:
        for node in sorted(queue, key=order):
            if busy.intersection(node.uses):
                continue
            queue.remove(node)
            opposed = any((OPPOSITE.get(what), rank) in busy for what, rank in node.uses)
            busy.update(node.uses)
            latest.update(dict.fromkeys(node.uses, node.turn))
            finish(node, node.duration * (both_ways if opposed else 1.0))

    for node in [node for node in nodes if not node.missing]:
        begin(node)
    serve()
    while done:
        now, _, node = heapq.heappop(done)
        busy.difference_update(node.uses)
        node.left -= 1
        if node.uses and node.left:
            queue.append(node)
        else:
            node.end = now
            for later in node.then:
                later.missing -= 1
                if not later.missing:
                    begin(later)
        serve()
    return now
