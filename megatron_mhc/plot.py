"""Figures of the stability of mHC models, as in the paper, from TensorBoard logs or from checkpoints.

    python -m megatron_mhc.plot gains    HC=runs/hc/tensorboard mHC=runs/mhc/tensorboard --out gains.png
    python -m megatron_mhc.plot heatmaps mHC=runs/mhc/tensorboard --out heatmaps.pdf
    python -m megatron_mhc.plot curves   plain=... HC=... mHC=... --reference plain --out curves.png

The logs need --mhc-log-interval (not for `curves`). From a checkpoint and a batch instead: give `gains`
and `heatmaps` the file that this writes, in any parallel layout:

    torchrun ... -m megatron_mhc.diagnostics.measure report.json <the run's arguments> --load CHECKPOINT
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mhc.run_logs import (
    COLOURS,
    GRADIENT_NORM,
    GREY,
    LOSS,
    MARKERS,
    Run,
    by_label,
    draw,
    losses_minus,
    mean_and_range,
    pyplot,
    read_run,
    save,
    series,
    smoothed,
)

DIRECTIONS = {"forward": "-", "backward": "--"}


def log_axis(axes: Any, values: Sequence[float]) -> None:
    """A log axis with plain numbers, wide enough that gains of 1 do not show rounding errors."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = [v for v in values if 0 < v < float("inf")] or [1.0]
    low, high = min(0.8, min(finite) / 1.1), max(1.25, max(finite) * 1.1)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    if high / low < 30:
        between = (1.1, 1.2, 9.0) if high / low < 3 else (3.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 8.0, *between)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1.0, color=GREY, linewidth=1, zorder=0)


def plot_gains(groups: dict[str, list[Run]], step: int | None, out: Path) -> None:
    """Single and composite gain against the sub-layer, and the worst composite gain against the step."""
    plt = pyplot()
    # Numbered before any is left out: a label keeps its colour in all figures of the same runs.
    numbered = list(enumerate(groups.items()))
    measured = [(i, group) for i, group in numbered if any(run.reports for run in group[1])]
    for label in groups.keys() - {label for _, (label, _) in measured}:
        print(f"{label}: no mHC diagnostics, left out of the gains")
    if not measured:
        next(iter(groups.values()))[0].report()  # says what to do
    panels = 3 if any(len(run.reports) > 1 for _, (_, runs) in measured for run in runs) else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.8 * panels, 4.8), layout="constrained")
    for axis, kind in zip(axes, ("gain", "composite_gain"), strict=False):
        values: list[float] = []
        for index, (label, runs) in measured:
            for direction, line in DIRECTIONS.items():
                curves = []
                for run in runs:
                    gains = run.report(step)["statistics"][f"{kind}_{direction}"]
                    curves.append(dict(enumerate(gains, start=1)))
                    values += gains
                draw_gain(axis, curves, index, f"{label}, {direction}", line)
        log_axis(axis, values)
        axis.set(xlabel="sub-layer, in the order in which they run", ylabel="Amax gain, mean over tokens")
        axis.legend()
    axes[0].set_title("One sub-layer: $H_l$")
    axes[1].set_title("Composite: forward $H_l \\cdots H_1$, backward $H_L \\cdots H_l$")
    if panels == 3:
        values = []
        for index, (label, runs) in measured:
            if not all(run.scalars for run in runs):
                continue  # measured from a checkpoint: one step
            for direction, line in DIRECTIONS.items():
                curves = [series(run, f"mhc/composite_gain_{direction}") for run in runs]
                values += [v for curve in curves for v in curve.values()]
                draw_gain(axes[2], curves, index, f"{label}, {direction}", line)
        log_axis(axes[2], values)
        axes[2].set(xlabel="training step", ylabel="largest composite gain of a sub-layer")
        axes[2].set_title("Over training")
        axes[2].legend()
    save(figure, out)


def draw_gain(axes: Any, curves: list[dict[int, float]], index: int, label: str, line: str) -> None:
    """Mean over seeds with a band; full markers are forward, open ones backward."""
    x, mean, low, high = mean_and_range(curves)
    colour = COLOURS[index % len(COLOURS)]
    axes.plot(
        x,
        mean,
        color=colour,
        linestyle=line,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        markevery=max(1, len(x) // 16),
        markerfacecolor=colour if line == "-" else "white",
        label=label + (f" ({len(curves)} seeds)" if len(curves) > 1 else ""),
    )
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def plot_heatmaps(runs: list[Run], step: int | None, sublayers: list[int] | None, out: Path) -> None:
    """Token means of H_res, single and composite, with row sums (forward) and column sums (backward)."""
    plt = pyplot()
    reports = [run.report(step) for run in runs]
    count = min(len(report["h_res"]) for report in reports)
    chosen = sublayers or sorted({1, 1 + count // 3, 1 + 2 * count // 3, count})
    if bad := [i for i in chosen if not 1 <= i <= count]:
        raise SystemExit(f"--sublayers {bad[0]}: there are 1 to {count}")
    rows = 2 * len(runs)
    figure, axes = plt.subplots(
        rows, len(chosen), figsize=(3.9 * len(chosen), 3.5 * rows), layout="constrained", squeeze=False
    )
    for r, (run, report) in enumerate(zip(runs, reports, strict=True)):
        for k, (name, title) in enumerate((("h_res", "$H_{%d}$"), ("composite", "$H_{%d} \\cdots H_1$"))):
            for c, i in enumerate(chosen):
                text = "$H_1$, the first" if name == "composite" and i == 1 else title % i
                draw_matrix(axes[2 * r + k][c], report[name][i - 1], f"{run.label}: {text}")
    save(figure, out)


def draw_matrix(axes: Any, matrix: list[list[float]], title: str) -> None:
    """One mapping, with its numbers: row i says what the written stream i takes of each stream read."""
    import numpy as np

    m = np.asarray(matrix)
    finite = np.abs(m[np.isfinite(m)])
    largest = max(finite.max() if finite.size else 1.0, 1e-12)
    signed = bool((m < 0).any())
    # Both maps are safe for colour-blind readers; with signs, white is zero.
    limits = (
        dict(cmap="PuOr", vmin=-largest, vmax=largest) if signed else dict(cmap="cividis", vmin=0, vmax=1)
    )
    if not signed and largest > 1:
        limits["vmax"] = largest
    image = axes.imshow(m, **limits)
    for (i, j), value in np.ndenumerate(m):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        size = 9 if m.shape[0] <= 4 else 6
        axes.text(
            j, i, number(value), ha="center", va="center", fontsize=size, color="white" if dark else "black"
        )
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.ax.grid(False)
    small = 8 if largest < 100 and m.shape[0] <= 4 else 6
    rows = [f"{i}: Σ {number(s)}" for i, s in enumerate(m.sum(axis=1), start=1)]
    columns = [f"{j}\nΣ {number(s)}" for j, s in enumerate(m.sum(axis=0), start=1)]
    axes.set_yticks(range(len(rows)), rows, fontsize=small)
    axes.set_xticks(range(len(columns)), columns, fontsize=small)
    axes.set_xlabel("stream read: Σ of its column (backward gain)", fontsize=8)
    axes.set_ylabel("stream written: Σ of its row (forward gain)", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.grid(False)


def number(value: float) -> str:
    """Three digits, more of a number in the thousands."""
    if abs(value) < 10:
        return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no -0.00
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}" if abs(value) < 1e5 else f"{value:.1e}"


def plot_curves(groups: dict[str, list[Run]], reference: str, window: int | None, out: Path) -> None:
    """Loss, loss gap to a reference, and gradient norm, on one axis of steps."""
    plt = pyplot()
    if reference not in groups:
        raise SystemExit(f"--reference {reference}: no such label; there are {', '.join(groups)}")
    figure, axes = plt.subplots(3, 1, figsize=(9, 10), layout="constrained", sharex=True)
    width = window or max(1, max(len(series(run, LOSS)) for runs in groups.values() for run in runs) // 50)
    for index, (label, runs) in enumerate(groups.items()):
        losses = [series(run, LOSS) for run in runs]
        draw(axes[0], losses, index, label, width)
        if label != reference:
            draw(axes[1], losses_minus(runs, groups[reference]), index, label, width)
        if all(GRADIENT_NORM in run.scalars for run in runs):
            draw(axes[2], [series(run, GRADIENT_NORM) for run in runs], index, label)
    axes[1].axhline(0.0, color=GREY, linewidth=1, zorder=0)
    axes[0].set(title="Training loss" + smoothed(width), ylabel="loss")
    axes[1].set(title=f"Loss minus that of {reference} at the same step", ylabel="loss gap")
    axes[2].set(title="Gradient norm (before clipping)", ylabel="gradient norm", xlabel="training step")
    axes[2].set_yscale("log")
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend()
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mhc.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (("gains", "against sub-layers"), ("heatmaps", "of H_res"), ("curves", "of losses")):
        command = commands.add_parser(name, help=words)
        command.add_argument(
            "runs", nargs="+", metavar="[LABEL=]RUN", help="TensorBoard folder, or report.json"
        )
        command.add_argument("--out", type=Path, required=True, help=".png or .pdf; a missing folder is made")
        if name == "curves":
            command.add_argument("--reference", required=True, help="label of the runs to subtract")
            command.add_argument("--window", type=int, help="steps of the trailing mean (a 50th of the run)")
        else:
            command.add_argument("--step", type=int, help="a logged step (the last)")
        if name == "heatmaps":
            command.add_argument("--sublayers", help="numbers from 1, by commas (4 of them)")
    options = parser.parse_args()
    runs = [read_run(argument) for argument in options.runs]
    if options.command == "gains":
        plot_gains(by_label(runs), options.step, options.out)
    elif options.command == "heatmaps":
        sublayers = [int(i) for i in options.sublayers.split(",")] if options.sublayers else None
        plot_heatmaps(runs, options.step, sublayers, options.out)
    else:
        plot_curves(by_label(runs), options.reference, options.window, options.out)


if __name__ == "__main__":
    main()
