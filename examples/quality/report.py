"""Make docs/quality.md's tables and figures of the kept logs.

    python examples/quality/report.py            of docs/results/quality, into docs/quality.md
    python examples/quality/report.py --kept FOLDER --page PAGE --scale tiny

A number is a mean over seeds with its standard error. A gap is taken seed by seed, so that both runs of a
pair saw the same text in the same order. What is missing is said, run by run, and no kept run is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import logs  # noqa: E402
from plan import (  # noqa: E402
    ALL_FORMS,
    SCALES,
    STUDIES,
    Log,
    Planned,
    Scale,
    best_rate,
    by_name,
    estimate,
    final,
    plan,
    step_ms,
    sweep,
)

from megatron_mhc import run_logs  # noqa: E402

DOCS = HERE.parents[1] / "docs"
PAGE, KEPT = DOCS / "quality.md", DOCS / "results" / "quality"
# Two-sided 95 % quantiles of Student's t, by degrees of freedom: with how few seeds a gap is a difference.
QUANTILE = {1: 12.7, 2: 4.30, 3: 3.18, 4: 2.78}
PAPER = {"hc-res": "-0.022", "hc-res-pre": "-0.025", "hc": "-0.027"}  # arXiv 2512.24880, its ablation of HC
MAIN_BUDGET = 20
CONDITIONS = {"": "equal steps", "-time": "equal GPU time"}
SIDES = ("below", "above", "not shown to differ", "diverged", "not measured")
NO_OTHER = "No other form has all of its runs"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, NaN for one seed."""

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")

    @property
    def signed(self) -> str:
        return "diverged" if not math.isfinite(self.mean) else ("+" if self.mean >= 0 else "") + str(self)

    @property
    def shown(self) -> bool:
        """Whether it differs from 0 at 95 %."""
        return self.seeds > 1 and abs(self.mean) > QUANTILE.get(self.seeds - 1, 2.6) * self.error


def over_seeds(values: Iterable[float]) -> Estimate | None:
    values = list(values)
    if not values:
        return None
    if not all(map(math.isfinite, values)) or len(values) == 1:
        return Estimate(statistics.fmean(values), math.nan, len(values))
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))


def text_of(estimate: Estimate | None, signed: bool = False) -> str:
    return "-" if estimate is None else estimate.signed if signed else str(estimate)


class Experiment:
    """The runs of one number of tokens a parameter, on one text.

    Args:
        known: their logs, and timings.
    """

    def __init__(self, scale: Scale, budget: float, known: list[Log]):
        self.scale, self.budget, self.logs = scale, budget, by_name(known)
        self.planned = plan(scale, budget, known)

    @property
    def missing(self) -> list[Planned]:
        return [run for run in self.planned if final_or_time(self.logs.get(run.name)) is None]

    def rate(self, form: str) -> tuple[float | None, bool]:
        """A form's best learning rate at the smallest size of those that are there; whether all are."""
        if (best := best_rate(self.scale, self.budget, form, self.logs)) is not None:
            return best, True
        losses = self.sweep_losses(ALL_FORMS[form].rate_of or form)
        there = {lr: loss for lr, loss in losses.items() if loss is not None}
        return (min(there, key=lambda lr: there[lr]) if there else None), False

    def sweep_losses(self, form: str) -> dict[float, float | None]:
        runs = sorted(sweep(self.scale, self.budget, form), key=lambda run: run.lr or 0)
        return {run.lr: final(self.logs.get(run.name)) for run in runs if run.lr is not None}

    def runs(self, size: str, form: str, tag: str = "") -> dict[int, Log]:
        """Logs at the best rate by seed, finished or not; tag `-time`: those of equal GPU time."""
        small = self.scale.sizes[self.scale.smallest]
        rate, _ = self.rate(form)
        if rate is None:
            return {}
        lr = float(f"{rate * small.hidden / self.scale.sizes[size].hidden:.3g}")
        lr = rate if size == self.scale.smallest else lr
        name = f"{size}-t{self.budget:g}-{form}-lr{lr:.4g}-s"
        found = {seed: self.logs.get(f"{name}{seed}{tag}") for seed in self.scale.sizes[size].seeds}
        return {seed: log for seed, log in found.items() if log is not None}

    def finals(self, size: str, form: str, tag: str = "") -> dict[int, float]:
        ends = {seed: final(log) for seed, log in self.runs(size, form, tag).items()}
        return {seed: loss for seed, loss in ends.items() if loss is not None}

    def gap(self, size: str, form: str, tag: str = "") -> Estimate | None:
        """A form's held-out loss minus the plain form's of the same seed."""
        own, plain = self.finals(size, form, tag), self.finals(size, "vanilla")
        return over_seeds(own[seed] - plain[seed] for seed in sorted(own.keys() & plain.keys()))

    def complete(self, size: str, form: str, tag: str = "") -> bool:
        """Whether the sweep and every seed of a form are there."""
        return self.rate(form)[1] and len(self.finals(size, form, tag)) == len(self.scale.sizes[size].seeds)


def final_or_time(log: Log | None) -> float | None:
    """What a finished run ends with; None while it is not finished."""
    if log is not None and log["finished"] and log["study"] == "timing":
        return log["step_ms"]
    return final(log)


def experiments(scale: Scale, known: list[Log], digest: str | None) -> list[Experiment]:
    """Of the text whose hash is given: the main budget, and every other one that has runs, longest first."""
    mine = [log for log in known if log["data"] == digest and log["size"] in scale.sizes]
    timings = [log for log in known if log["study"] == "timing"]
    budgets = {log["budget"] for log in mine if log["study"] != "timing"} | {float(MAIN_BUDGET)}
    return [
        Experiment(scale, budget, timings + [log for log in mine if log["budget"] == budget])
        for budget in sorted(budgets, reverse=True)
    ]


def learning_rates(one: Experiment) -> str:
    """Held-out loss of seed 1 at every rate."""
    rows = []
    for form in one.scale.sizes[one.scale.smallest].forms:
        losses = one.sweep_losses(form)
        there = [loss for loss in losses.values() if loss is not None and math.isfinite(loss)]

        def cell(loss: float | None, there: list[float] = there) -> str:
            if loss is None:
                return "missing"
            said = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            return f"**{said}**" if there and loss == min(there) else said

        rows.append([ALL_FORMS[form].label, *map(cell, losses.values())])
    text = table(["form", *(f"lr {lr:g}" for lr in sorted(one.scale.rates))], rows)
    edges = [
        ALL_FORMS[form].label
        for form in one.scale.sizes[one.scale.smallest].forms
        if (found := one.rate(form))[1] and found[0] in (min(one.scale.rates), max(one.scale.rates))
    ]
    if edges:
        text += f"\nBest at an end of the range, so perhaps better beyond it: {'; '.join(edges)}.\n"
    return text


def parameters(runs: dict[int, Log]) -> str:
    found = [log["parameters"] for log in runs.values() if log.get("parameters")]
    return f"{found[0] / 1e6:.1f}" if found else "-"


def at_best(one: Experiment, size: str, forms: Iterable[str], paper: bool = False) -> str:
    """Losses and gaps at the best rate; a * where the sweep is not complete."""
    plain = step_ms(size, "vanilla", one.logs)
    head = ["form", "parameters, M", "lr", "seeds", "held-out loss", "gap to plain, equal steps"]
    timed = any(one.runs(size, form, "-time") for form in forms)
    head += ["gap, equal GPU time"] * timed + ["step, ms", "time over plain"]
    rows = []
    for form in forms:
        rate, whole = one.rate(form)
        runs, ends = one.runs(size, form), one.finals(size, form)
        ms = step_ms(size, form, one.logs)
        lr = "-" if not runs else f"{next(iter(runs.values()))['lr']:g}" + "*" * (not whole)
        gap = None if form == "vanilla" else one.gap(size, form)
        row = [ALL_FORMS[form].label, parameters(runs), lr, str(len(ends))]
        row += [text_of(over_seeds(ends.values())), text_of(gap, signed=True)]
        row += [text_of(None if form == "vanilla" else one.gap(size, form, "-time"), signed=True)] * timed
        row += [f"{ms:.1f}" if ms else "-", f"{100 * (ms / plain - 1):+.1f} %" if ms and plain else "-"]
        rows.append(row + [PAPER.get(form, "-")] * paper)
    return table(head + ["gap in the paper, 27B"] * paper, rows)


def health(one: Experiment, size: str, forms: Iterable[str]) -> str:
    """Largest gains and gradient norms over all seeds at the best rate."""
    rows = []
    for form in forms:
        runs = list(one.runs(size, form).values())
        norms = [norm for log in runs for step, norm in log["gradient_norm"] if step > log["steps"] // 10]
        row = [ALL_FORMS[form].label]
        for name in ("composite_gain_forward", "composite_gain_backward", "gain_backward"):
            values = [value for log in runs for _, value in log["gains"].get(name, [])]
            row.append(f"{max(values):.4g}" if values else "-")
        row += [f"{statistics.median(norms):.3f}", f"{max(norms):.3f}"] if norms else ["-", "-"]
        rows.append(row)
    gains = ["composite gain forward, peak", "backward, peak", "gain backward of one sub-layer, peak"]
    return table(["form", *gains, "gradient norm, median", "largest"], rows)


def state(one: Experiment) -> str:
    """Which runs are there and which are missing, by study; s1 is seed 1."""
    rows = []
    groups: dict[tuple[str, str], list[Planned]] = {}
    for run in one.planned:
        groups.setdefault((run.size, run.study), []).append(run)
    missing = {run.name for run in one.missing}
    prefix = re.compile(r"^\w+-(t[\d.]+|timing)-")
    for (size, study), runs in groups.items():
        gone = [run for run in runs if run.name in missing]
        names: dict[str, list[str]] = {}
        for run in gone:
            log = one.logs.get(run.name)
            cut = f" (at step {log['reached']} of {log['steps']})" if log else ""
            rest = prefix.sub("", run.name).removeprefix(run.form).removeprefix("-").removeprefix("lrbest-")
            names.setdefault(run.form, []).append(rest + cut)
        said = "; ".join(f"{form} {', '.join(some)}".strip() for form, some in names.items())
        rows.append([size, study, f"{len(runs) - len(gone)} of {len(runs)}", said or "none"])
    hours = sum(estimate(run, one.scale, one.logs) for run in one.missing)
    text = table(["size", "study", "there", "missing"], rows)
    return (
        text
        if not missing
        else text + f"\nEstimated for what is missing: {hours:.1f} GPU hours of one H200.\n"
    )


def sources(known: list[Log], about: dict[str, Any] | None) -> str:
    """Device, versions, commits and the text."""
    if not known or about is None:
        return "No run is kept.\n"

    def every(key: str) -> str:
        return ", ".join(sorted({str(log[key]) for log in known}))

    versions = sorted(
        {f"{name} {found}" for log in known for name, found in log["versions"].items() if found}
    )
    lines = [
        f"- Device: {every('device')}; commit {every('commit')}; {every('date')}; {', '.join(versions)}.",
        f"- Text: {about['train']['tokens'] / 1e6:.1f} million tokens of {len(about['packages'])} packages "
        f"({about['bytes_per_token']} bytes a token, vocabulary {about['vocabulary']}); held out, "
        f"{about['held_out']['tokens'] / 1e6:.2f} million tokens: "
        f"{', '.join(f'{name} {one["version"]}' for name, one in about['held_out_packages'].items())}. "
        f"Hash of the token streams: {about['hash']}. Every package with its version: "
        "[data.json](results/quality/data.json).",
    ]
    others = sorted({log["data"] for log in known if log["study"] != "timing"} - {about["hash"]})
    if others:
        runs = sum(log["data"] in others for log in known)
        lines.append(f"- {runs} kept runs are of other texts ({', '.join(others)}), in no table here.")
    return "\n".join(lines) + "\n"


def section(one: Experiment, about: dict[str, Any] | None, figures: list[str]) -> str:
    """Everything of one experiment."""
    small = one.scale.smallest
    text = f"### {one.budget:g} tokens a parameter\n\n{state(one)}\n"
    if not any(log["study"] != "timing" for log in one.logs.values()):
        return text
    for name, size in one.scale.sizes.items():
        if not any(log["size"] == name and log["study"] != "timing" for log in one.logs.values()):
            continue
        steps = size.steps(one.budget)
        tokens = steps * size.batch * size.sequence
        epochs = f", {tokens / about['train']['tokens']:.1f} epochs" if about else ""
        text += (
            f"**{name}**: {size.layers} layers of {size.hidden} (MLP {size.ffn}, {size.heads} heads), "
            f"{steps} steps of {size.batch} sequences of {size.sequence}: {tokens / 1e6:.1f} million "
            f"tokens{epochs}.\n\n"
        )
        if name == small:
            text += "Held-out loss (nats a token) by learning rate, seed 1:\n\n" + learning_rates(one) + "\n"
        text += "At each form's best rate (* of those that are there; the sweep is not complete):\n\n"
        text += at_best(one, name, size.forms) + "\n" + health(one, name, size.forms) + "\n"
        if name == small:
            titles = {
                "hc_parts": ("HC with some of its mappings fixed", ("vanilla", *STUDIES["hc_parts"], "hc")),
                "mhc_parts": (
                    "mHC with some of its mappings fixed (while H_post is, the streams stay equal)",
                    ("vanilla", *STUDIES["mhc_parts"], "mhc4"),
                ),
                "streams": ("Number of streams", ("vanilla", "mhc1", "mhc2", "mhc4", "mhc8")),
            }
            for study in one.scale.studies:
                if any(one.runs(small, form) for form in STUDIES[study]):
                    title, forms = titles[study]
                    text += f"{title}:\n\n{at_best(one, small, forms, study == 'hc_parts')}\n"
        mine = [path for path in figures if f"{name}_t{one.budget:g}_" in path]
        text += "".join(f"![{name}, {one.budget:g} tokens a parameter]({path})\n" for path in mine) + "\n"
    return text


def conclusion(every: list[Experiment]) -> str:
    """Two sentences that the numbers bear, of the longest runs that are complete; or what is missing."""
    for one in every:
        small = one.scale.smallest
        sizes = [s for s in one.scale.sizes if one.complete(s, "vanilla") and one.complete(s, "mhc4")]
        if small not in sizes:
            continue
        short = f" (the runs of {MAIN_BUDGET} are missing)" if one.budget < MAIN_BUDGET else ""
        said = "; ".join(f"at {size}, {verdict(one, size, 'mhc4')}" for size in sizes)
        runs = f"In runs of {one.budget:g} tokens a parameter{short}"
        first = f"{runs}, the held-out loss of mHC with four streams is, {said}"
        others = [form for form in one.scale.sizes[small].forms if form not in ("vanilla", "mhc4")]
        others = [form for form in others if one.complete(small, form)]
        told = [
            f"at {condition} {told_apart(one, small, others, tag)}" for tag, condition in CONDITIONS.items()
        ]
        second = f"Of the other forms, at {small}: {'; '.join(told)}" if others else NO_OTHER
        return f"{first}. {second}.\n"
    main = next(one for one in every if one.budget == MAIN_BUDGET)
    return f"**No conclusion: {len(main.missing)} of {len(main.planned)} runs are missing.**\n"


def verdict(one: Experiment, size: str, form: str) -> str:
    """What the gaps of a form say."""
    words = []
    for tag, condition in CONDITIONS.items():
        if (gap := one.gap(size, form, tag)) is None:
            words.append(f"not measured at {condition}")
        elif not math.isfinite(gap.mean):
            words.append(f"infinite at {condition}, as a seed diverged")
        elif gap.shown:
            size_of = Estimate(abs(gap.mean), gap.error, gap.seeds)
            side = "below" if gap.mean < 0 else "above"
            words.append(f"{size_of} {side} the plain residual's at {condition}")
        else:
            words.append(f"not shown to differ from the plain residual's at {condition} ({gap.signed})")
    return " and ".join(words)


def told_apart(one: Experiment, size: str, forms: list[str], tag: str) -> str:
    """The forms that end below the plain residual, above it, and those of which neither is shown."""
    sides: dict[str, list[str]] = {}
    for form in forms:
        gap = one.gap(size, form, tag)
        side = "not measured" if gap is None else "not shown to differ"
        if gap is not None and not math.isfinite(gap.mean):
            side = "diverged"
        elif gap is not None and gap.shown:
            side = "below" if gap.mean < 0 else "above"
        label = ALL_FORMS[form].label + (f" {gap.signed}" if gap and math.isfinite(gap.mean) else "")
        sides.setdefault(side, []).append(label)
    return ", ".join(f"{side} ({', '.join(sides[side])})" for side in SIDES if side in sides)


def forms(scale: Scale) -> str:
    """The forms by the names that their runs have."""
    named = {name: ALL_FORMS[name] for name in scale.sizes[scale.smallest].forms}
    for study in scale.studies:
        named |= STUDIES[study]
    rows = (
        [f"`{name}`", form.label, f"`{' '.join(form.arguments)}`", form.rate_of or "its own"]
        for name, form in named.items()
    )
    return table(["name", "form", "arguments", "sweep of the learning rate"], rows)


def parts(scale: Scale, known: list[Log], about: dict[str, Any] | None, figures: list[str]) -> dict[str, str]:
    """What stands between each pair of markers of the page."""
    every = experiments(scale, known, about["hash"] if about else None)
    return {
        "quality_conclusion": conclusion(every),
        "quality_forms": forms(scale),
        "quality_sources": sources(known, about),
        "quality_results": "\n".join(section(one, about, figures) for one in every),
    }


def filled(page: str, made: dict[str, str]) -> str:
    """The page with its generated parts."""
    for name, text in made.items():
        mark, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if page.count(mark) != 1 or page.count(end) != 1:
            raise SystemExit(f"the page has not one pair {mark} {end}")
        page = page[: page.index(mark)] + f"{mark}\n{text}" + page[page.index(end) :]
    return page


def read(kept: Path) -> tuple[list[Log], dict[str, Any] | None]:
    """The kept logs, and what data.json says."""
    record = kept / "data.json"
    return logs.read(kept), json.loads(record.read_text()) if record.exists() else None


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


def made(page: Path, kept: Path, scale: Scale) -> str:
    """The page's text with what the kept logs give."""
    known, about = read(kept)
    every = experiments(scale, known, about["hash"] if about else None)
    folder = kept.relative_to(page.parent, walk_up=True)
    figures = [str(folder / name) for one in every for name in figure_names(one)]
    return filled(page.read_text(), parts(scale, known, about, figures))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--scale", choices=SCALES, default="full")
    options = parser.parse_args(arguments)
    known, about = read(options.kept)
    every = experiments(SCALES[options.scale], known, about["hash"] if about else None)
    drawn = draw_all(every, options.kept)
    options.page.write_text(made(options.page, options.kept, SCALES[options.scale]))
    print(f"{options.page}: {len(known)} logs, {len(drawn)} figures")


if __name__ == "__main__":
    main()
