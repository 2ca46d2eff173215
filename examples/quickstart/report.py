"""Plot a finished quickstart: the losses of both models, their difference, and the gains of the mappings.

python report.py runs/quickstart        writes runs/quickstart/quickstart.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind readers too
STYLES = {"mhc": ("with mHC", BLUE, "o", "-", BLUE), "plain": ("without mHC", ORANGE, "s", "--", "white")}


def smooth(values: Sequence[float]) -> list[float]:
    """Trailing mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def plot_losses(axes: Any, losses: dict[str, Any]) -> None:
    for kind, (label, colour, marker, line, fill) in STYLES.items():
        steps, values = zip(*losses[kind]["train"], strict=True)
        axes.plot(steps, smooth(values), color=colour, linestyle=line, label=f"{label}, training")
        final = losses[kind]["final"][-1]
        points = [point for point in losses[kind]["validation"] if point[0] < final[0]] + [final]
        style = {"color": colour, "marker": marker, "markersize": 7, "linestyle": "", "markerfacecolor": fill}
        axes.plot(*zip(*points, strict=True), **style, label=f"{label}, validation: {final[1]:.3f}")
    axes.set(title="Loss", xlabel="training step", ylabel="loss (nats per byte)")
    axes.legend()


def plot_difference(axes: Any, losses: dict[str, Any]) -> None:
    plain = dict(losses["plain"]["train"])
    steps, values = zip(*[(i, loss - plain[i]) for i, loss in losses["mhc"]["train"]], strict=True)
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(steps, smooth(values), color=BLUE, label="trailing mean")
    axes.axhline(0.0, color=GREY, linewidth=1)
    axes.set(title="Training loss: with mHC minus without", xlabel="training step", ylabel="nats per byte")
    axes.legend()


def plot_gains(axes: Any, gains: dict[str, list[float]]) -> None:
    sublayers = range(1, len(gains["composite forward"]) + 1)
    for name, colour, marker in (("forward", BLUE, "o"), ("backward", ORANGE, "s")):
        composite, single = gains[f"composite {name}"], gains[f"single {name}"]
        label = "forward, from the input" if name == "forward" else "backward, from the output"
        axes.plot(sublayers, composite, color=colour, marker=marker, label=f"composite {label}")
        axes.plot(sublayers, single, color=colour, linestyle=":", label=f"one sub-layer, {name}")
    axes.axhline(1.0, color=GREY, linewidth=1, zorder=0)
    lowest, highest = axes.get_ylim()
    axes.set_ylim(min(lowest, 0.98), max(highest, 1.06))  # or a gain of 1 would show rounding errors
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(title="Gain of the stream mappings after training")
    axes.set(xlabel="sub-layer (attention and MLP in turn)", ylabel="Amax gain, mean over tokens")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the quickstart's results")
    out = parser.parse_args().out
    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 9})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    losses = json.loads((out / "losses.json").read_text())
    plot_losses(left, losses)
    plot_difference(middle, losses)
    plot_gains(right, json.loads((out / "gains.json").read_text()))
    figure.savefig(out / "quickstart.png", dpi=130)


if __name__ == "__main__":
    main()
