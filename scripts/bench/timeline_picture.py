"""Pictures of one rank's step: from CUDA events around its operations, and from a profiler's trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from timeline import Log

from megatron_mhc.schedule import program

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {
    "forward": "#4c78a8",
    "backward": "#72b7b2",
    "replay": "#b279a2",
    "copy": "#f58518",
    "": "#999999",
    "kernel": "#4c78a8",
    "mHC": "#e45756",
}
Bar = tuple[str, float, float, str]  # row, start, end, colour's key


def draw(log: Log, path: Path, title: str) -> None:
    """The middle third of one step: a row for each stream."""
    origin = log.begun[0][1]
    bars: list[Bar] = []
    timed = {id(op) for op, *_ in log.nodes}
    for (op, start), (_, end) in zip(log.begun, log.begun[1:], strict=False):
        if op.kind in program.COMPUTE and id(op) not in timed:
            bars.append(("compute", start.since(origin), end.since(origin), op.kind))
    for node, name, start, end, _ in log.nodes:
        bars.append((name, start.since(origin), end.since(origin), node.kind if node else ""))
    for name, start, end in log.copies:
        row = "copies in" if name in ("streams", "write", "mixed") else "copies, gradients"
        bars.append((row, start.since(origin), end.since(origin), "copy"))
    last = max(end for _, _, end, _ in bars)
    label = "ms (blue forward, green backward, orange copies)"
    _draw(bars, (last / 3, 2 * last / 3), path, title, label)


def draw_trace(trace: Path, path: Path, title: str, part: float = 0.15) -> None:
    """The middle `part` of a step that torch.profiler exported: a row for each CUDA stream."""
    bars = trace_bars(json.loads(trace.read_text())["traceEvents"])
    if not bars:
        return  # no GPU
    first, last = min(start for _, start, _, _ in bars), max(end for _, _, end, _ in bars)
    bars = [(row, start - first, end - first, kind) for row, start, end, kind in bars]
    middle, half = (last - first) / 2, part * (last - first) / 2
    label = "ms (blue kernels, red those of mHC, orange copies)"
    _draw(bars, (middle - half, middle + half), path, title, label)


def trace_bars(events: list[dict[str, Any]]) -> list[Bar]:
    """Kernels and copies in milliseconds; mHC's are Triton's, whose names are plain words."""
    bars = []
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in ("kernel", "gpu_memcpy"):
            continue
        name, start = event["name"], event["ts"] / 1e3
        kind = "copy" if event["cat"] == "gpu_memcpy" else "kernel"
        if kind == "kernel" and name.startswith("_") and name.isidentifier():
            kind = "mHC"
        bars.append((f"stream {event['args']['stream']}", start, start + event["dur"] / 1e3, kind))
    return bars


def _draw(bars: list[Bar], window: tuple[float, float], path: Path, title: str, label: str) -> None:
    low, high = window
    bars = [bar for bar in bars if bar[2] > low and bar[1] < high]
    rows = sorted({row for row, *_ in bars}, key=lambda row: (len(row), row))
    figure, axes = pyplot.subplots(figsize=(16, 0.8 + 0.5 * len(rows)))
    for row in rows:
        mine = [bar for bar in bars if bar[0] == row]
        spans = [(start, end - start) for _, start, end, _ in mine]
        colours = [COLOURS[kind] for *_, kind in mine]
        axes.broken_barh(spans, (rows.index(row) - 0.35, 0.7), facecolors=colours, lw=0.2, ec="w")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(low, high)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
