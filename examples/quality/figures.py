"""The figures of an experiment: losses and gaps; gains and gradient norms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from plan import ALL_FORMS, Log, step_ms
from results import Experiment

from megatron_mhc import run_logs


def figure_names(one: Experiment) -> list[str]:
    """The figures that `draw_all` draws of an experiment: of each size with runs of two forms."""
    names = []
    for size, about in one.scale.sizes.items():
        if sum(bool(one.runs(size, form)) for form in about.forms) > 1:
            names += [f"{size}_t{one.budget:g}_{kind}.png" for kind in ("loss", "health")]
    return names


def curve(log: Log, name: str) -> dict[int, float]:
    return {int(step): value for step, value in log[name]}


def smoothed(points: dict[int, float], window: int = 5) -> dict[int, float]:
    steps = sorted(points)
    return dict(zip(steps, run_logs.smooth([points[step] for step in steps], window), strict=True))


def draw_loss(one: Experiment, size: str, path: Path) -> None:
    """Held-out loss by rate; gaps in training loss to the plain form against steps and against GPU time."""
    plt = run_logs.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5.2), layout="constrained")
    plain = {seed: smoothed(curve(log, "loss")) for seed, log in one.runs(size, "vanilla").items()}
    plain_ms = step_ms(size, "vanilla", one.logs)
    for i, form in enumerate(one.scale.sizes[size].forms):
        colour = run_logs.COLOURS[i % len(run_logs.COLOURS)]
        style = {
            "color": colour,
            "marker": run_logs.MARKERS[i % len(run_logs.MARKERS)],
            "label": ALL_FORMS[form].label,
        }
        if size == one.scale.smallest:
            points = [(lr, loss) for lr, loss in one.sweep_losses(form).items() if loss is not None]
            points = [(lr, loss) for lr, loss in points if math.isfinite(loss)]
            if points:
                left.plot(*zip(*points, strict=True), **style)
        else:
            ends = [loss for loss in one.finals(size, form).values() if math.isfinite(loss)]
            left.plot([ALL_FORMS[form].label] * len(ends), ends, linestyle="", **style)
        if form == "vanilla":
            continue
        gaps = _gaps(one.runs(size, form), plain, 1.0)
        if gaps:
            run_logs.draw(middle, gaps, i, ALL_FORMS[form].label)
        own_ms = step_ms(size, form, one.logs)
        if own_ms and plain_ms:
            equal = one.runs(size, form, "-time")
            timed = _gaps(equal or one.runs(size, form), plain, own_ms / plain_ms)
            hours = [{at * plain_ms / 3.6e6: value for at, value in gap.items()} for gap in timed]
            if hours:
                said = "equal time" if equal else "equal steps"
                run_logs.draw(right, hours, i, f"{ALL_FORMS[form].label}, runs of {said}")
    if size == one.scale.smallest:
        left.set(xscale="log", xlabel="peak learning rate", title="Held-out loss by learning rate, seed 1")
    else:
        left.tick_params(axis="x", rotation=30)
        left.set(title="Held-out loss, every seed")
    left.set(ylabel="nats a token")
    middle.set(xlabel="step", title="Training loss minus the plain residual's, same step and seed")
    right.set(xlabel="GPU hours", title="The same, at equal GPU time")
    for axes in (middle, right):
        axes.axhline(0.0, color=run_logs.GREY, linewidth=1)
        axes.set(ylabel="nats a token", ylim=_limits(axes))
    for axes in (left, middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(
        f"{size}, {one.budget:g} tokens a parameter, each form at its best rate of those that are there"
    )
    run_logs.save(figure, path)
    plt.close(figure)


def _gaps(
    runs: dict[int, Log], plain: dict[int, dict[int, float]], stretch: float
) -> list[dict[float, float]]:
    """Each seed's training loss minus the plain form's, which is read off at `stretch` times the step; by the
    plain form's step."""
    gaps = []
    for seed, log in runs.items():
        if seed not in plain:
            continue
        own, steps = smoothed(curve(log, "loss")), sorted(plain[seed])
        inside = [step for step in sorted(own) if steps[0] <= step * stretch <= steps[-1]]
        gaps.append({s * stretch: own[s] - _between(plain[seed], steps, s * stretch) for s in inside})
    return [gap for gap in gaps if gap]


def _between(points: dict[int, float], steps: list[int], at: float) -> float:
    """Linear interpolation."""
    low = max(step for step in steps if step <= at)
    high = min(step for step in steps if step >= at)
    share = 0.0 if high == low else (at - low) / (high - low)
    return points[low] + share * (points[high] - points[low])


def _limits(axes: Any) -> tuple[float, float]:
    """The range of the later two thirds of the lines: the first steps' gaps are large and say little."""
    values = [y for line in axes.get_lines() for y in list(line.get_ydata())[len(line.get_ydata()) // 3 :]]
    low, high = min(values, default=-0.1), max(values, default=0.1)
    room = 0.15 * (high - low) or 0.1
    return low - room, high + room


def draw_health(one: Experiment, size: str, path: Path) -> None:
    """Composite gains and gradient norms over the steps."""
    plt = run_logs.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5.2), layout="constrained")
    for i, form in enumerate(one.scale.sizes[size].forms):
        runs = list(one.runs(size, form).values())
        for axes, name in ((left, "composite_gain_forward"), (middle, "composite_gain_backward")):
            curves = [{int(s): v for s, v in log["gains"][name]} for log in runs if log["gains"].get(name)]
            if curves:
                run_logs.draw(axes, curves, i, ALL_FORMS[form].label)
        norms = [curve(log, "gradient_norm") for log in runs if log["gradient_norm"]]
        if norms:
            run_logs.draw(right, norms, i, ALL_FORMS[form].label)
    left.set(title="Composite gain forward, worst sub-layer", ylabel="gain (1: neither grows nor shrinks)")
    middle.set(title="Composite gain backward, worst sub-layer", ylabel="gain")
    right.set(title="Gradient norm, in front of clipping at 1", ylabel="norm")
    for axes in (left, middle, right):
        axes.set(yscale="log", xlabel="step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(f"{size}, {one.budget:g} tokens a parameter")
    run_logs.save(figure, path)
    plt.close(figure)


def draw_all(every: list[Experiment], folder: Path) -> list[Path]:
    """Draw the figures of all experiments into a folder."""
    drawn = []
    for one in every:
        for name in figure_names(one):
            draw = draw_loss if name.endswith("_loss.png") else draw_health
            draw(one, name.partition("_")[0], folder / name)
            drawn.append(folder / name)
    return drawn
