"""Draw what train.py measured: overhead over vanilla, by wall time and by kernel time.

python scripts/bench/train_figure.py train.json [train.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAPER = 6.7  # %, n = 4, with the paper's overlap of pipeline communication
COLOURS = {"wall_ms": "#2c6fbb", "kernels_ms": "#9ec5ee"}
NAMES = {"wall_ms": "wall time", "kernels_ms": "kernel time"}


def label(row: dict[str, Any]) -> str:
    """The name of a row's bars."""
    if row["n"] is None:
        return "vanilla again"
    return f"n={row['n']} {row['ops']}" + (", recompute" if row["recompute"] == "auto" else "")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure; says so where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib here: run train_figure.py on the JSON where it is installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["ops"] != "vanilla" and row.get("overhead_pct"):
            groups.setdefault((row["model"], row["batch"]), []).append(row)
    if not groups:
        print("no row to draw: the figure needs vanilla and another")
        return
    longest = max(map(len, groups.values()))
    size = (6 * len(groups), 1.8 + 0.45 * longest)
    figure, axes = pyplot.subplots(1, len(groups), figsize=size, squeeze=False, layout="constrained")
    for axis, ((model, batch), rows) in zip(axes[0], groups.items(), strict=True):
        for shift, key in ((-0.2, "wall_ms"), (0.2, "kernels_ms")):
            bars = [(at + shift, row["overhead_pct"].get(key)) for at, row in enumerate(rows)]
            bars = [(at, value) for at, value in bars if value is not None]
            if bars:
                drawn = axis.barh(*zip(*bars, strict=True), 0.4, color=COLOURS[key], label=NAMES[key])
                axis.bar_label(drawn, fmt="%+.1f", padding=2, fontsize=8)
        axis.axvline(PAPER, color="black", linestyle=":", linewidth=1, label=f"paper, n=4: {PAPER} %")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=10)  # the reference is ten times the rest
        values = [row["overhead_pct"].get(key, 0) for row in rows for key in COLOURS]
        low, high = min(-3, 2 * min(values)), max(15, 3 * max(values))  # room for the numbers
        axis.set_xlim(low, high)
        ticks = [tick for tick in (-100, -10, 0, 5, 10, 30, 100, 300) if low <= tick <= high]
        axis.set_xticks(ticks, list(map(str, ticks)), minor=False)
        axis.minorticks_off()
        axis.set_yticks(range(len(rows)), [label(row) for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("% over vanilla (mean of its two runs)")
        axis.set_title(f"{model}, {batch} sequences a micro-batch")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    settings = report["settings"]
    figure.suptitle(
        f"Overhead of mHC on a training step: {report['device']}, {settings['layers']} layers, "
        f"s={settings['seq']}, {settings['micro_batches']} micro-batches",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), Path(sys.argv[2]) if sys.argv[2:] else source.with_suffix(".png"))
