"""Read training runs to compare and to draw: TensorBoard folders, and reports measured from checkpoints.

A run is given as PATH or LABEL=PATH; runs of one label are seeds of one model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOSS, GRADIENT_NORM = "lm loss", "grad-norm"
VALIDATION = "lm loss validation"
# A GPT's layer has an attention and an MLP; a HybridModel's has one sub-layer, of any kind.
_SUBLAYER = re.compile(r"mhc/(\w+)/((layer|mtp)_(\d+)_(\w+))")

# Okabe and Ito's colours, told apart by colour-blind readers too; lines and markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"


@dataclass
class Run:
    """One training run.

    Args:
        scalars: TensorBoard tag -> step -> value; where a resumed run wrote a step again, the later.
        reports: step -> a diagnostics report as `megatron_mhc.diagnostics.Report` saves it.
    """

    label: str
    path: Path
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)

    def report(self, step: int | None = None) -> dict[str, Any]:
        """The report of a step, the last one by default."""
        if not self.reports:
            raise SystemExit(
                f"{self.path}: no mHC diagnostics; train with --mhc-log-interval 100, or measure a "
                "checkpoint by python -m megatron_mhc.diagnostics.measure"
            )
        if step is not None and step not in self.reports:
            raise SystemExit(f"{self.path}: no diagnostics of step {step}; there are {sorted(self.reports)}")
        return self.reports[max(self.reports) if step is None else step]


def read_run(argument: str) -> Run:
    """Read `LABEL=PATH` or `PATH`: a TensorBoard folder, or a report's .json."""
    label, separator, path_text = argument.rpartition("=")
    path = Path(path_text)
    run = Run(label if separator else path.stem, path)
    if path.suffix == ".json":
        if not path.is_file():
            raise SystemExit(f"{path}: no such file")
        run.reports[0] = json.loads(path.read_text())
        return run
    if not path.is_dir() or not any(path.glob("events.*")):
        raise SystemExit(f"{path}: no TensorBoard events there; give the folder of --tensorboard-dir")
    read_events(run)
    return run


def read_events(run: Run) -> None:
    """Fill a run's scalars and reports from its TensorBoard folder."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util
    except ImportError:
        raise SystemExit(f"{run.path}: reading it needs tensorboard: pip install tensorboard") from None

    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for tag in events.Tags()["scalars"]:
        run.scalars[tag] = {event.step: event.value for event in events.Scalars(tag)}
    for name in ("h_res", "composite"):
        if f"mhc/{name}" in events.Tags()["tensors"]:
            for event in events.Tensors(f"mhc/{name}"):
                matrices = tensor_util.make_ndarray(event.tensor_proto)
                run.reports.setdefault(event.step, {"statistics": {}})[name] = matrices.tolist()
    for tag, values in run.scalars.items():
        if found := _SUBLAYER.fullmatch(tag):
            # In the order in which they run: layers of multi-token prediction come last.
            place = found[3] == "mtp", int(found[4]), found[5] == "mlp", found[2]
            for step, value in values.items():
                report = run.reports.setdefault(step, {"statistics": {}})
                report["statistics"].setdefault(found[1], {})[place] = value
    for report in run.reports.values():
        by_statistic = report["statistics"]
        report["sublayers"] = [place[-1] for place in sorted(set().union(*by_statistic.values()))]
        for name, by_place in by_statistic.items():
            by_statistic[name] = [by_place[place] for place in sorted(by_place)]


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of each label, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def series(run: Run, tag: str) -> dict[int, float]:
    """A scalar by step."""
    if tag not in run.scalars:
        raise SystemExit(f"{run.path}: no scalar {tag!r}; there are {', '.join(sorted(run.scalars))[:300]}")
    return run.scalars[tag]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over `window` values, fewer at the beginning."""
    parts = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def smoothed(window: int) -> str:
    """What a title says about smoothing."""
    return f" (trailing mean of {window} steps)" if window > 1 else ""


def mean_and_range(
    curves: Sequence[dict[int, float]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all curves have, and there their mean, least and largest value."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    return steps, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def losses_minus(runs: Sequence[Run], reference: Sequence[Run], tag: str = LOSS) -> list[dict[int, float]]:
    """Each run's loss minus the reference's at the same step: of the same seed where both have equally
    many runs, of their mean otherwise."""
    curves = [series(run, tag) for run in reference]
    if len(runs) != len(reference):
        steps, mean, *_ = mean_and_range(curves)
        curves = [dict(zip(steps, mean, strict=True))] * len(runs)
    gaps = []
    for run, curve in zip(runs, curves, strict=True):
        values = series(run, tag)
        gaps.append({step: values[step] - curve[step] for step in sorted(values.keys() & curve.keys())})
        if not gaps[-1]:
            raise SystemExit(f"{run.path}: no step in common with the reference")
    return gaps


def draw(axes: Any, curves: Sequence[dict[int, float]], index: int, label: str, window: int = 1) -> None:
    """A label's mean over its seeds, smoothed, in a band from least to largest."""
    smoothed = []
    for curve in curves:
        steps = sorted(curve)
        smoothed.append(dict(zip(steps, smooth([curve[s] for s in steps], window), strict=True)))
    steps, mean, low, high = mean_and_range(smoothed)
    colour = COLOURS[index % len(COLOURS)]
    style = ("-", "--", "-.", ":")[index % 4]
    seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
    axes.plot(steps, mean, color=colour, linestyle=style, linewidth=1.8, label=label + seeds)
    if len(curves) > 1:
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def pyplot() -> Any:
    """matplotlib.pyplot without a display, in one style."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 9})
    plt.rcParams.update({"axes.axisbelow": True, "pdf.fonttype": 42})
    return plt


def save(figure: Any, path: Path) -> None:
    """Write a PNG or PDF, by the path's suffix, and print its path, and that of a folder made for it."""
    if path.suffix not in (".png", ".pdf"):
        raise SystemExit(f"{path}: give a name that ends in .png or .pdf")
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
        print(f"made the folder {path.parent}")
    figure.savefig(path, dpi=140)
    print(path)
