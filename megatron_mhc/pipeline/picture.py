"""Draw the timeline of a pipeline step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mhc.run_logs import pyplot, save
from megatron_mhc.schedule.program import ALL_TO_ALL, COMPUTE, REPLAY, Op, Plan

if TYPE_CHECKING:
    from megatron_mhc.pipeline.simulate import Run

COLOURS = {"forward": "#4c78a8", "backward": "#72b7b2", "replay": "#b279a2", "all-to-all": "#f58518"}
LEGEND = "A number is a micro-batch, from 0. The tint is the chunk of the model on its rank. White is idle."


def draw(run: Run, plan: Plan, path: str, title: str) -> None:
    """Write a picture: one row a rank, one bar an operation, darker for later chunks of the model.

    Raises:
        SystemExit: matplotlib is missing, or the path ends in neither .png nor .pdf.
    """
    plt = pyplot()
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(16, 1.5 + 0.5 * plan.pp), layout="constrained")
    drawn = set()
    for rank, timeline in enumerate(run.timeline):
        for op, start, end in timeline:
            if op.kind not in COMPUTE or end <= start:
                continue
            beside, kind = op.what in ALL_TO_ALL, bar_kind(op)
            drawn.add(kind)
            axes.broken_barh(
                [(start, end - start)],
                (rank + 0.3, 0.15) if beside else (rank - 0.4, 0.65),
                facecolors=COLOURS[kind],
                alpha=tint(op.stage // plan.pp, plan.vpp),
                edgecolor="white",
                linewidth=0.3,
            )
            if (end - start) > run.step / 90 and op.kind != REPLAY and not beside:
                middle = (start + end) / 2
                axes.text(middle, rank - 0.08, str(op.microbatch), ha="center", va="center", fontsize=6)
    axes.set_ylim(plan.pp - 0.5, -0.5)
    axes.set_yticks(range(plan.pp), [f"rank {rank}" for rank in range(plan.pp)])
    axes.set_xlim(0, run.step)
    axes.set_xlabel("ms")
    axes.set_title(f"{title}: {run.step:.0f} ms")
    axes.grid(False)
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in drawn]
    for chunk in range(plan.vpp if plan.vpp > 1 else 0):
        alpha, label = tint(chunk, plan.vpp), f"chunk {chunk + 1} of {plan.vpp}"
        handles.append(Patch(facecolor="black", alpha=alpha, label=label))
    figure.legend(title=LEGEND, handles=handles, ncols=min(8, len(handles)), loc="outside lower center")
    save(figure, Path(path))
    plt.close(figure)


def bar_kind(op: Op) -> str:
    """The name of the colour of a compute operation."""
    return "all-to-all" if op.what in ALL_TO_ALL else op.kind


def tint(chunk: int, chunks: int) -> float:
    """Opacity of a chunk's bars."""
    return 0.4 + 0.6 * (chunk + 1) / chunks
