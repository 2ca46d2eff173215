"""What one rank's GPU did in a profiled step: compute and each kind of communication, alone and together.

A communication kernel also runs while it waits for the other rank, so what is `exposed` holds the waiting
(a pipeline's bubble) along with the transfer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import ON_GPU

Spans = list[tuple[float, float]]
COMPUTE, P2P, ALL_TO_ALL, COLLECTIVE = KINDS = ("compute", "p2p", "all-to-all", "collectives")
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Kernel:
    """Something that a GPU did, from `start` to `end` in milliseconds of a clock that ranks share."""

    start: float
    end: float
    kind: str
    name: str


def kind_of(name: str, arguments: dict[str, Any], pp: int, ep: int) -> str:
    """What a kernel is, where pipelines are `pp` deep and experts lie on `ep` ranks.

    Messages between stages and all-to-alls are the same kernel. Where both are possible, the profiler's note
    of the collective tells them apart, which it takes only if it records the host too.

    Raises:
        ValueError: such a note is missing.
    """
    lower = name.lower()
    if not lower.startswith("nccl"):
        return COMPUTE
    if "sendrecv" not in lower and "alltoall" not in lower:
        return COLLECTIVE
    if pp == 1 or ep == 1:
        return ALL_TO_ALL if pp == 1 else P2P
    collective = str(arguments.get("Collective name", ""))
    if "all_to_all" in collective.lower():
        return ALL_TO_ALL
    group = str(arguments.get("Process Group Description", ""))
    if collective.lower() in ("send", "recv", "coalesced") or "PIPELINE" in group:
        return P2P
    raise ValueError(f"{name} with {arguments}: a message or an all-to-all? profile the host too")


def read_trace(path: Path, pp: int, ep: int) -> list[Kernel]:
    """The GPU work in a trace that torch.profiler exported."""
    trace = json.loads(path.read_text())
    # Not the whole number: a float does not hold the microseconds of decades.
    origin = trace.get("baseTimeNanoseconds", 0) % 10**15 / 1e6
    return [
        Kernel(
            origin + event["ts"] / 1e3,
            origin + (event["ts"] + event["dur"]) / 1e3,
            kind_of(event["name"], event.get("args", {}), pp, ep),
            event["name"],
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _GPU_WORK
    ]


def union(spans: Spans) -> Spans:
    """Disjoint spans, in order, that cover the same time."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def minus(spans: Spans, others: Spans) -> Spans:
    """The part of `spans` outside of `others`; both as `union` returns them."""
    left: Spans = []
    at = 0
    for start, end in spans:
        while at < len(others) and others[at][1] <= start:
            at += 1
        later = at
        while later < len(others) and others[later][0] < end:
            if others[later][0] > start:
                left.append((start, others[later][0]))
            start = max(start, others[later][1])
            later += 1
        if start < end:
            left.append((start, end))
    return left


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def spans_of(kernels: list[Kernel]) -> dict[str, Spans]:
    """The union of the spans of each kind."""
    return {kind: union([(k.start, k.end) for k in kernels if k.kind == kind]) for kind in KINDS}


def summary(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds from the first kernel to the last: of each kind, exposed (no compute meanwhile), idle."""
    spans = spans_of(kernels)
    everything = union([span for kind in KINDS for span in spans[kind]])
    if not everything:
        return {}
    whole = everything[-1][1] - everything[0][0]
    found = {"whole": whole, "idle": whole - length(everything)}
    for kind in KINDS:
        found[kind] = length(spans[kind])
        if kind != COMPUTE:
            found[f"exposed {kind}"] = length(minus(spans[kind], spans[COMPUTE]))
    found["without compute"] = whole - found[COMPUTE]
    return found


def traced(run: Callable[[], Any], path: Path) -> dict[str, float]:
    """Profile a call on this rank: `summary` of its kernels, which are written to `path` for `draw`."""
    from megatron.core import parallel_state

    pp = parallel_state.get_pipeline_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    kinds = [ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
    if pp > 1 and ep > 1:
        kinds.append(ProfilerActivity.CPU)  # slower, but messages and all-to-alls can be told apart
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=kinds) as recorded:
            run()
            torch.cuda.synchronize()
        whole = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(whole))
        kernels = read_trace(whole, pp, ep)
    path.write_text(json.dumps([(k.start, k.end, k.kind) for k in kernels]))
    return summary(kernels)


def kept(path: Path) -> list[Kernel]:
    """What `traced` has written."""
    return [Kernel(*found, name="") for found in json.loads(path.read_text())]


def draw(ranks: list[list[Kernel]], path: Path, title: str) -> None:
    """The middle third of a step, a row for each kind of work on each rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = min(k.start for kernels in ranks for k in kernels)
    last = max(k.end for kernels in ranks for k in kernels)
    low, high = first + (last - first) / 3, first + 2 * (last - first) / 3
    rows: list[tuple[str, Spans, str]] = []
    colours = dict(zip(KINDS, ("#4c78a8", "#f58518", "#54a24b", "#b279a2"), strict=True))
    for rank, kernels in enumerate(ranks):
        found = spans_of(kernels).items()
        rows += [(f"rank {rank} {kind}", spans, colours[kind]) for kind, spans in found if spans]
    figure, axes = pyplot.subplots(figsize=(16, 1 + 0.4 * len(rows)))
    for at, (_, spans, colour) in enumerate(rows):
        bars = [(start - first, end - start) for start, end in spans if end > low and start < high]
        axes.broken_barh(bars, (at - 0.35, 0.7), facecolors=colour)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlim(low - first, high - first)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
