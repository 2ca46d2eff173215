"""Draw the timeline of a pipeline step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mhc.pipeline.program import ALL_TO_ALL, COMPUTE, FORWARD, REPLAY, Plan

if TYPE_CHECKING:
    from megatron_mhc.pipeline.simulate import Run

COLOURS = {"forward": "#4c78a8", "backward": "#72b7b2", "replay": "#b279a2", "all-to-all": "#f58518"}


def draw(run: Run, plan: Plan, path: str, title: str) -> None:
    """Write a picture: one row a rank, one bar an operation, darker for later chunks of the model.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError(f"drawing {path} needs matplotlib: pip install matplotlib") from error
    figure, axes = pyplot.subplots(figsize=(16, 0.6 + 0.5 * plan.pp))
    for rank, timeline in enumerate(run.timeline):
        for op, start, end in timeline:
            if op.kind not in COMPUTE or end <= start:
                continue
            beside = op.what in ALL_TO_ALL
            kind = "all-to-all" if beside else REPLAY if op.kind == REPLAY else op.kind
            shade = 0.55 + 0.45 * (op.stage // plan.pp + 1) / plan.vpp
            low, height = (rank + 0.3, 0.15) if beside else (rank - 0.4, 0.65)
            axes.broken_barh(
                [(start, end - start)],
                (low, height),
                facecolors=COLOURS[kind],
                alpha=shade,
                edgecolor="white",
                linewidth=0.3,
            )
            if (end - start) > run.step / 90 and op.kind in (FORWARD, "backward") and not beside:
                middle = (start + end) / 2
                axes.text(middle, rank - 0.08, str(op.microbatch), ha="center", va="center", fontsize=6)
    axes.set_ylim(plan.pp - 0.5, -0.5)
    axes.set_yticks(range(plan.pp), [f"rank {rank}" for rank in range(plan.pp)])
    axes.set_xlim(0, run.step)
    axes.set_xlabel("ms")
    axes.set_title(f"{title}: {run.step:.0f} ms", fontsize=10)
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()],
        fontsize=7,
        ncols=4,
        loc="lower right",
        bbox_to_anchor=(1, 1),
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
