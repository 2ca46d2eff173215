"""Draw what train.py measured, overhead over vanilla by wall time and by kernel time, and print its table.

python scripts/bench/train_figure.py FIGURE.png REPORT.json [REPORT.json ...]

Several reports, for example of one model each, must be of the same device, versions and settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAPER = 6.7  # %, n = 4, with the paper's overlap of pipeline communication
KEYS = ("wall_ms", "kernels_ms", "peak_MiB")
COLOURS = {"wall_ms": "#2c6fbb", "kernels_ms": "#9ec5ee"}
NAMES = {"wall_ms": "wall time", "kernels_ms": "kernel time"}


def label(row: dict[str, Any]) -> str:
    """The name of a row's bars."""
    if row["n"] is None:
        return "vanilla again"
    return f"n={row['n']} {row['ops']}" + (", recompute" if row["recompute"] == "auto" else "")


def table(rows: list[dict[str, Any]]) -> str:
    head = "model | b | n | ops | recompute | wall ms | + % | kernels ms | + % | busy | launches/layer "
    head += "| tokens/s | MiB | + % | states | loss | from reference | MHz"
    lines = [f"| {head} |", "|---" * 18 + "|"]
    columns = {"wall_ms": 1, "kernels_ms": 1, "busy": 3, "launches_per_layer": 0, "tokens_per_s": 0}
    columns |= {"peak_MiB": 0, "states_MiB": 0, "loss": 4, "loss_from_reference": 5, "MHz": 0}
    for row in rows:
        cells = [row["model"], str(row["batch"]), str(row["n"] or "-"), row["ops"], row["recompute"]]
        for key, digits in columns.items():
            cells.append("-" if row.get(key) is None else f"{row[key]:.{digits}f}")
            if key in KEYS:
                more = row.get("overhead_pct", {}).get(key)
                cells.append("" if more is None else f"{more:+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def merge(paths: list[Path]) -> dict[str, Any]:
    """The rows of all reports under the head of the first.

    Raises:
        SystemExit: another device, version or setting.
    """
    merged, *others = (json.loads(path.read_text()) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        for name in ("device", "versions", "settings"):
            if other[name] != merged[name]:
                raise SystemExit(f"{path}: {name} {other[name]}, in {paths[0]} {merged[name]}")
        merged["rows"] += other["rows"]
    return merged


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    report = merge(list(map(Path, sys.argv[2:])))
    print(table(report["rows"]))
    draw(report, Path(sys.argv[1]))
