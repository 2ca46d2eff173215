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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import logs  # noqa: E402
from figures import draw_all, figure_names  # noqa: E402
from plan import ALL_FORMS, SCALES, STUDIES, Log, Planned, Scale, estimate, step_ms  # noqa: E402
from results import MAIN_BUDGET, Estimate, Experiment, experiments, over_seeds  # noqa: E402

DOCS = HERE.parents[1] / "docs"
PAGE, KEPT = DOCS / "quality.md", DOCS / "results" / "quality"
PAPER = {"hc-res": "-0.022", "hc-res-pre": "-0.025", "hc": "-0.027"}  # arXiv 2512.24880, its ablation of HC
CONDITIONS = {"": "equal steps", "-time": "equal GPU time"}
SIDES = ("below", "above", "not shown to differ", "diverged", "not measured")
NO_OTHER = "No other form has all of its runs"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def text_of(estimate: Estimate | None, signed: bool = False) -> str:
    return "-" if estimate is None else estimate.signed if signed else str(estimate)


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
    if missing:
        text += f"\nEstimated for what is missing: {hours:.1f} GPU hours of one H200.\n"
    return text


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
