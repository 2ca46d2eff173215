"""Draw a stability experiment's figures and sum its numbers up.

    python examples/stability/report.py runs/stability     writes runs/stability/figures/

A run that is not finished is drawn as far as it has come, and losses are compared at the last step that all
have reached.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

from megatron_mhc.run_logs import LOSS, Run, by_label, read_run

LOSS_COMPARE = Path(__file__).resolve().parents[2] / "scripts/loss_compare.py"

LABELS = {
    "plain": "plain",
    "hc": "HC",
    "mhc": "mHC",
    "single_pass": "single-pass mHC",
    "identity": "mHC of H_res I",
    "gated": "gated residual",
}
STEP_TIME = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")


def started(out: Path) -> list[str]:
    """LABEL=FOLDER of the runs that have logged something, model by model, seeds in order."""
    found = []
    for model, label in LABELS.items():
        folders = [path / "tensorboard" for path in out.glob(f"{model}_seed*")]
        folders = [path for path in folders if any(path.glob("events.*"))]
        folders.sort(key=lambda path: int(path.parent.name.rpartition("seed")[2]))
        for argument in (f"{label}={path}" for path in folders):
            run = read_run(argument)
            if LOSS in run.scalars and (model == "plain" or "mhc/composite_gain_forward" in run.scalars):
                found.append(argument)
            else:
                print(f"{run.path}: nothing logged yet, left out")
    return found


def peak(run: Run, tag: str) -> float:
    """The largest value over the steps; NaN where one is."""
    values = list(run.scalars[tag].values())
    return math.nan if any(map(math.isnan, values)) else max(values)


def summary(groups: dict[str, list[Run]]) -> list[dict]:
    """One row per model; of several seeds the mean, and of gains the largest."""
    rows = []
    for label, runs in groups.items():
        reached = [max(run.scalars[LOSS]) for run in runs]
        row: dict = {"model": label, "seeds": len(runs), "steps": reached}
        for name, tag in (
            ("composite_gain_forward", "mhc/composite_gain_forward"),
            ("composite_gain_backward", "mhc/composite_gain_backward"),
            ("gain_backward", "mhc/gain_backward"),
            ("column_error", "mhc/column_error"),
        ):
            if all(tag in run.scalars for run in runs):
                row[f"peak_{name}"] = max(peak(run, tag) for run in runs)
                row[f"last_{name}"] = [run.scalars[tag][max(run.scalars[tag])] for run in runs]
        times = [times for run in runs if (times := step_times(run.path.parent / "log.txt"))]
        row["median_step_ms"] = statistics.median([t for some in times for t in some]) if times else None
        rows.append(row)
    return rows


def step_times(log: Path) -> list[float]:
    """Milliseconds per step, without the first ten steps."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return [float(ms) for ms in STEP_TIME.findall(text)][1:]


def table(rows: list[dict]) -> str:
    """The gains in Markdown."""

    def gain(row: dict, name: str) -> str:
        if f"peak_{name}" not in row:
            return "- | -"
        last = ", ".join(f"{value:.3g}" for value in row[f"last_{name}"])
        return f"{row[f'peak_{name}']:.4g} | {last}"

    # The largest of all sub-layers; of the peak also over steps and seeds.
    lines = [
        "| model | steps | composite gain forward, peak | at the end | backward, peak | at the end | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        forward, backward = gain(row, "composite_gain_forward"), gain(row, "composite_gain_backward")
        time = f"{row['median_step_ms']:.0f}" if row["median_step_ms"] else "-"
        steps = ", ".join(map(str, row["steps"]))
        lines.append(f"| {row['model']} | {steps} | {forward} | {backward} | {time} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the experiment's runs")
    out = parser.parse_args().out.resolve()
    figures = out / "figures"
    arguments = started(out)
    if not arguments:
        raise SystemExit(f"{out}: no run has logged anything, so no figures")
    groups = by_label(read_run(argument) for argument in arguments)
    mapped = [argument for argument in arguments if not argument.startswith("plain=")]

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    figures.mkdir(exist_ok=True)
    text = table(rows := summary(groups)) + "\n"
    if mapped:
        python("-m", "megatron_mhc.plot", "gains", *arguments, "--out", str(figures / "gains.png"))
        first = [next(a for a in mapped if a.startswith(f"{label}=")) for label in groups if label != "plain"]
        python("-m", "megatron_mhc.plot", "heatmaps", *first, "--out", str(figures / "heatmaps.png"))
    reference = next(iter(groups))
    curves = figures / "curves.png"
    python("-m", "megatron_mhc.plot", "curves", *arguments, "--reference", reference, "--out", str(curves))
    if len(groups) > 1:
        common = min(step for row in rows for step in row["steps"])
        until = ["--until", str(common)] if any(set(row["steps"]) != {common} for row in rows) else []
        gap = python(str(LOSS_COMPARE), *arguments, *until, "--out", str(figures / "loss_gap.png"))
        text += "\n" + "\n".join(line for line in gap.splitlines() if line.startswith("|")) + "\n"
    (figures / "summary.json").write_text(json.dumps(rows, indent=1))
    (figures / "summary.md").write_text(text)
    print(text)
    print(f"figures and tables: {figures}")


if __name__ == "__main__":
    main()
