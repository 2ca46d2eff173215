"""Compare the losses of two or more runs: the gap to a reference, smoothed, as a table and a figure.

    python scripts/loss_compare.py plain=runs/plain/tensorboard mHC=runs/mhc/tensorboard --out gap.png

The first label is the reference unless --reference names another. Runs of one label are seeds; their gap
is that to the same seed of the reference where both have equally many. Losses are means of the last
--window steps; the table is also written as .json beside the figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from megatron_mhc.run_logs import (
    GRADIENT_NORM,
    GREY,
    LOSS,
    VALIDATION,
    Run,
    by_label,
    draw,
    losses_minus,
    pyplot,
    read_run,
    save,
    series,
    smoothed,
)


def cut(run: Run, last: int) -> None:
    """Drop what a run logged after a step."""
    for tag, values in run.scalars.items():
        run.scalars[tag] = {step: value for step, value in values.items() if step <= last}
    run.scalars = {tag: values for tag, values in run.scalars.items() if values}


def tail(curve: dict[int, float], window: int) -> float:
    """Mean of the last `window` values."""
    return statistics.mean([curve[step] for step in sorted(curve)[-window:]])


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds; None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def compare(groups: dict[str, list[Run]], reference: str, window: int, tag: str) -> list[dict[str, Any]]:
    """One row per label: final loss, gap to the reference at the end, validation loss, gradient norm."""
    rows = []
    for label, runs in groups.items():
        gaps = [tail(gap, window) for gap in losses_minus(runs, groups[reference], tag)]
        finals = [tail(series(run, tag), window) for run in runs]
        norms = [run.scalars[GRADIENT_NORM] for run in runs if GRADIENT_NORM in run.scalars]
        checks = [run.scalars[VALIDATION] for run in runs if VALIDATION in run.scalars]
        rows.append(
            {
                "label": label,
                "runs": len(runs),
                "steps": min(max(series(run, tag)) for run in runs),
                "loss": statistics.mean(finals),
                "loss_std": spread(finals),
                "gap": statistics.mean(gaps) if label != reference else None,
                "gap_std": spread(gaps) if label != reference else None,
                "validation": statistics.mean([tail(c, 1) for c in checks]) if checks else None,
                "largest_gradient_norm": max(max(norm.values()) for norm in norms) if norms else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; a deviation over seeds follows its mean."""

    def cell(value: float | None, deviation: float | None = None, sign: str = "") -> str:
        if value is None:
            return "-"
        return f"{value:{sign}.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")

    lines = [
        "| runs | seeds | steps | loss | gap to reference | validation loss | largest gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["label"], str(r["runs"]), str(r["steps"]), cell(r["loss"], r["loss_std"])]
        cells += [cell(r["gap"], r["gap_std"], "+"), cell(r["validation"])]
        cells.append("-" if r["largest_gradient_norm"] is None else f"{r['largest_gradient_norm']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(groups: dict[str, list[Run]], reference: str, window: int, tag: str, out: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for index, (label, runs) in enumerate(groups.items()):
        draw(left, [series(run, tag) for run in runs], index, label, window)
        if label != reference:
            draw(right, losses_minus(runs, groups[reference], tag), index, label, window)
    left.set(title=tag + smoothed(window), xlabel="training step", ylabel="loss")
    right.set(
        title=f"{tag} minus that of {reference} at the same step", xlabel="training step", ylabel="loss gap"
    )
    right.axhline(0.0, color=GREY, linewidth=1, zorder=0)
    left.legend()
    if right.get_legend_handles_labels()[1]:
        right.legend()
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="TensorBoard folder")
    parser.add_argument("--out", type=Path, help=".png or .pdf; without it the table alone")
    parser.add_argument("--reference", help="label of the runs to subtract (the first)")
    parser.add_argument("--window", type=int, help="steps of the trailing mean (a 50th of the run)")
    parser.add_argument("--until", type=int, help="compare at this step, not at the last")
    parser.add_argument("--tag", default=LOSS, help=f"TensorBoard scalar ({LOSS})")
    options = parser.parse_args()
    runs = [read_run(argument) for argument in options.runs]
    if options.until:
        for run in runs:
            cut(run, options.until)
    groups = by_label(runs)
    reference = options.reference or next(iter(groups))
    if reference not in groups:
        parser.error(f"--reference {reference}: no such label; there are {', '.join(groups)}")
    if len(groups) < 2:
        parser.error("give runs of at least two labels, as LABEL=FOLDER")
    window = options.window or max(1, len(series(groups[reference][0], options.tag)) // 50)
    rows = compare(groups, reference, window, options.tag)
    print(table(rows))
    if options.out:
        plot(groups, reference, window, options.tag, options.out)
        numbers = {"reference": reference, "window": window, "tag": options.tag, "rows": rows}
        options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
