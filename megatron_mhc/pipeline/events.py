"""Things that happen one after the other, and those of them that take turns at a link; no torch."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

Link = tuple[str, int]  # one way, "in" or "out", of a rank's link


@dataclass(eq=False)
class Node:
    """Something that happens once all its predecessors have: an operation or a transfer.

    Args:
        duration: milliseconds of each of its slices.
        uses: the links that it has for itself during a slice; between two slices others may have them.
    """

    duration: float
    missing: int = 0
    then: list[Node] = field(default_factory=list)
    uses: tuple[Link, ...] = ()
    slices: int = 1
    start: float = -1.0
    end: float = -1.0
    left: int = 0

    def after(self, *earlier: Node | None) -> Node:
        for node in earlier:
            if node is not None:
                node.then.append(self)
                self.missing += 1
        return self


def run(nodes: list[Node]) -> float:
    """Set every node's start and end; returns the time of the last. What waits for itself never starts."""
    now, count = 0.0, 0
    done: list[tuple[float, int, Node]] = []
    queue: list[Node] = []  # what waits for its links, in turn
    busy: set[Link] = set()

    def begin(node: Node) -> None:
        if node.start < 0:
            node.start, node.left = now, node.slices
        if node.uses:
            queue.append(node)
        else:
            finish(node)

    def finish(node: Node) -> None:
        nonlocal count
        count += 1
        heapq.heappush(done, (now + node.duration, count, node))

    def serve() -> None:
        for node in list(queue):
            if not busy.intersection(node.uses):
                queue.remove(node)
                busy.update(node.uses)
                finish(node)

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
