"""How many sub-layers a block holds: the memory of a plan, and the plan that needs least. No torch.

A block keeps its first stream tensor, of n*C channels a token; its replay brings back the others and
what the sub-layers read. Memory is highest when the backward pass of a block starts: all blocks before it
keep theirs, this one has everything back, and the layers before its end still hold what F saved.

    peak = max over blocks k of  (k + 1) nC + (s_k - 1) nC + s_k * read + (kept + inside of layers < end_k)

Eq. (20) is this for equal blocks, with read = 2C and nothing inside F: nC ceil(L / L_r) + (n + 2) C L_r.
F's own activations are freed as the backward pass proceeds, so early blocks may be longer than late ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import sqrt

GIB = 2**30


@dataclass(frozen=True)
class SubLayerBytes:
    """Bytes of one sub-layer and micro-batch on one rank.

    Args:
        streams: x, all n streams; the same for all sub-layers of a chunk.
        read: the layer input and, where a module of its own makes it, the norm's output.
        kept: what mHC keeps in any case: F's output and the coefficients.
        inside: what F saves in addition; a lower bound is safe, and 0 gives the paper's expression.
    """

    streams: int
    read: int
    kept: int = 0
    inside: int = 0


def closed_form(n: int, sublayers: int) -> float:
    """The block size that minimises Eq. (20): sqrt(n L / (n + 2)). Source: arXiv 2512.24880 Eq. (20)."""
    return sqrt(n * sublayers / (n + 2))


def uniform(sublayers: int, size: int) -> list[int]:
    """Blocks of `size` sub-layers, the last one of what remains."""
    whole, rest = divmod(sublayers, size)
    return [size] * whole + [rest] * (rest > 0)


class _Sums:
    """Sums over ranges of sub-layers, in bytes."""

    def __init__(self, sublayers: Sequence[SubLayerBytes]):
        self.streams = [0, *accumulate(s.streams for s in sublayers)]
        self.read = [0, *accumulate(s.read for s in sublayers)]
        self.held = [0, *accumulate(s.kept + s.inside for s in sublayers)]

    def at_block(self, start: int, end: int) -> int:
        """Bytes when the backward pass of the block [start, end) starts, less the earlier blocks' streams."""
        return self.streams[end] - self.streams[start] + self.read[end] - self.read[start] + self.held[end]


def peak(sublayers: Sequence[SubLayerBytes], blocks: Sequence[int], in_flight: int = 1) -> int:
    """The most bytes that a chunk's activations take with these blocks.

    Args:
        sublayers: the chunk's, in order of the forward pass.
        blocks: sizes that sum to their number.
        in_flight: micro-batches whose activations are held at once, this one included.
    """
    sums, start, kept, most = _Sums(sublayers), 0, 0, 0
    for size in blocks:
        most = max(most, kept + sums.at_block(start, start + size))
        kept += sublayers[start].streams
        start += size
    if start != len(sublayers):
        raise ValueError(f"blocks of {list(blocks)} sub-layers do not make {len(sublayers)}")
    return (in_flight - 1) * (kept + sums.held[-1]) + most


def without_replay(sublayers: Sequence[SubLayerBytes], in_flight: int = 1) -> int:
    """The bytes that a chunk's activations take when nothing is dropped."""
    return in_flight * sum(s.streams + s.read + s.kept + s.inside for s in sublayers)


def best_uniform(sublayers: Sequence[SubLayerBytes], in_flight: int = 1) -> int:
    """The block size N of least peak; the smallest of several."""
    sizes = range(1, len(sublayers) + 1)
    return min(sizes, key=lambda size: peak(sublayers, uniform(len(sublayers), size), in_flight))


def best(sublayers: Sequence[SubLayerBytes], in_flight: int = 1) -> list[int]:
    """The blocks of least peak, of any sizes.

    Exact, by dynamic programming over (number of blocks, sub-layers covered). Of equal peaks the one with
    the most blocks, which replays least.
    """
    count, sums, streams = len(sublayers), _Sums(sublayers), sublayers[0].streams
    # tables[k][end] of k blocks that cover [0, end): their least highest point, and the start of the last
    infinite = (float("inf"), 0)
    tables: list[list[tuple[float, int]]] = [[(0.0, 0)] + [infinite] * count]
    for number in range(1, count + 1):
        before, row = tables[-1], [infinite] * (count + 1)
        kept = (number - 1) * streams
        for end in range(number, count + 1):
            row[end] = min(
                (max(before[start][0], kept + sums.at_block(start, end)), start)
                for start in range(number - 1, end)
            )
        tables.append(row)

    def total(number: int) -> float:
        return (in_flight - 1) * (number * streams + sums.held[-1]) + tables[number][count][0]

    number = min(range(1, count + 1), key=lambda k: (total(k), -k))
    blocks, end = [], count
    for k in range(number, 0, -1):
        start = tables[k][end][1]
        blocks.append(end - start)
        end = start
    return blocks[::-1]


def choose(setting: str, sublayers: Sequence[SubLayerBytes], in_flight: int = 1) -> list[int]:
    """The blocks that `--mhc-recompute-layer-num` asks for: `auto` or a number, as text.

    None for a stage without layers.
    """
    if not sublayers:
        return []
    if setting == "auto":
        return best(sublayers, in_flight)
    return uniform(len(sublayers), int(setting))
