"""The runs of the quality experiment, as data: forms and sizes, and the runs of them in order of priority.

What follows from results (the best learning rate, and steps of equal time) is planned from the logs that are
there; until then its runs are listed as waiting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

Log = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A residual connection: its name in tables, its arguments, a guess of its time over the plain form's."""

    label: str
    arguments: tuple[str, ...]
    cost: float = 1.25
    rate_of: str = ""  # the form whose best learning rate it takes; its own by default


def _form(label: str, arguments: str, cost: float = 1.25, rate_of: str = "") -> Form:
    return Form(label, tuple(arguments.split()), cost, rate_of)


HC, FOUR = "--mhc-h-res unconstrained --mhc-num-residual-streams 4", "--mhc-num-residual-streams 4"
FORMS = {
    "vanilla": _form("plain residual", "--no-mhc", 1.0),
    "mhc4": _form("mHC n=4", FOUR + " --mhc-init home_stream"),
    "hc": _form("HC n=4", HC, 1.4),
    "single": _form("single-pass mHC n=4", FOUR + " --mhc-read previous", 1.2),
    "mhc2": _form("mHC n=2", "--mhc-num-residual-streams 2 --mhc-init home_stream", 1.2),
    "mhc4u": _form("mHC n=4 uniform init", FOUR + " --mhc-init uniform"),
    "mhc2u": _form("mHC n=2 uniform init", "--mhc-num-residual-streams 2 --mhc-init uniform", 1.2),
}
FIXED = " --mhc-h-pre fixed --mhc-h-post fixed"
HC_PARTS = {
    "hc-res": _form("HC: H_res only", HC + FIXED, 1.4, "hc"),
    "hc-res-pre": _form("HC: H_res, H_pre", HC + " --mhc-h-post fixed", 1.4, "hc"),
}
MHC_PARTS = {
    "mhc-res": _form("mHC: H_res only", FOUR + FIXED, 1.25, "mhc4"),
    "mhc-res-pre": _form("mHC: H_res, H_pre", FOUR + " --mhc-h-post fixed", 1.25, "mhc4"),
}
STREAMS = {
    "mhc1": _form("mHC n=1", "--mhc-num-residual-streams 1", 1.15, "mhc4"),
    "mhc8": _form("mHC n=8", "--mhc-num-residual-streams 8", 1.9, "mhc4"),
}
ALL_FORMS = FORMS | HC_PARTS | MHC_PARTS | STREAMS


@dataclass(frozen=True)
class Size:
    """A Llama-like model, its batch, and tokens a second that one H200 is guessed to train it with."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    parameters: float  # of the plain form, embeddings (tied) included
    batch: int  # sequences of a step
    micro_batch: int
    sequence: int = 1024
    rate: float = 1e6
    forms: tuple[str, ...] = tuple(FORMS)
    seeds: tuple[int, ...] = (1, 2, 3)

    def steps(self, tokens_per_parameter: float) -> int:
        """Steps that see so many tokens a parameter, rounded up."""
        return math.ceil(tokens_per_parameter * self.parameters / (self.batch * self.sequence))


def _parameters(layers: int, hidden: int, ffn: int, vocabulary: int) -> int:
    return layers * (4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden) + vocabulary * hidden + hidden


LARGER = ("vanilla", "mhc4", "hc", "single", "mhc2", "mhc4u")
SIZES = {
    "30m": Size(8, 512, 1408, 8, _parameters(8, 512, 1408, 8192), 128, 128),
    "110m": Size(14, 768, 2176, 12, _parameters(14, 768, 2176, 8192), 256, 64, rate=3.5e5, forms=LARGER),
    "300m": Size(
        24,
        1024,
        2688,
        16,
        _parameters(24, 1024, 2688, 8192),
        512,
        32,
        rate=1.4e5,
        forms=("vanilla", "mhc4", "hc"),
        seeds=(1,),
    ),  # fmt: skip
}
# A second experiment that a CPU runs in seconds, which shows that the chain works and nothing else.
TINY_SIZES = {
    "tiny": Size(2, 32, 64, 2, _parameters(2, 32, 64, 512), 8, 8, 32, 2e5, ("vanilla", "mhc4"), (1, 2)),
}


@dataclass(frozen=True)
class Scale:
    """The sizes of an experiment, smallest first, the rates of its sweep, and which studies it has."""

    sizes: dict[str, Size]
    rates: tuple[float, ...]
    middle: int
    studies: tuple[str, ...] = ("streams", "hc_parts", "mhc_parts")
    warmup: int = 200

    @property
    def smallest(self) -> str:
        return next(iter(self.sizes))


SCALES = {
    "full": Scale(SIZES, (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), 2),
    "tiny": Scale(TINY_SIZES, (1e-2, 3e-2), 0, studies=("streams",), warmup=2),
}
STUDIES = {"streams": STREAMS, "hc_parts": HC_PARTS, "mhc_parts": MHC_PARTS}
TIMED_STEPS = 60


@dataclass(frozen=True)
class Planned:
    """A run.

    Args:
        study: sweep (seed 1 of a learning rate), seeds (further ones at the best rate), time (as many steps
            as the plain form's GPU time lasts), timing (short, alone on its GPU), streams, hc_parts,
            mhc_parts, size (a larger model).
        lr: the peak learning rate; None while the sweep that it comes from is not complete.
        steps: None while they wait for timings.
        waits_for: what is missing to start it.
    """

    study: str
    size: str
    form: str
    seed: int
    lr: float | None
    steps: int | None
    budget: float
    waits_for: str = ""
    tag: str = field(default="")

    @property
    def name(self) -> str:
        """The name of its logs: size, tokens a parameter, form, rate and seed; `time` where steps differ."""
        rate = "best" if self.lr is None else f"{self.lr:.4g}"
        words = [self.size, f"t{self.budget:g}", self.form]
        if self.study == "timing":
            return "-".join([self.size, "timing", self.form])
        return "-".join([*words, f"lr{rate}", f"s{self.seed}", *(["time"] if self.study == "time" else [])])

    @property
    def startable(self) -> bool:
        return not self.waits_for


def by_name(logs: Iterable[Log]) -> dict[str, Log]:
    return {log["name"]: log for log in logs}


def final(log: Log | None) -> float | None:
    """The held-out loss at the end of a run; infinite if it diverged, None if it is not finished."""
    if log is None or not log["finished"]:
        return None
    return math.inf if log.get("diverged") else log["final"]


def sweep(scale: Scale, budget: float, form: str) -> list[Planned]:
    """The sweep of a form: every rate, the middle one first, with seed 1."""
    size = scale.sizes[scale.smallest]
    order = sorted(range(len(scale.rates)), key=lambda i: (abs(i - scale.middle), i))
    steps = size.steps(budget)
    return [Planned("sweep", scale.smallest, form, 1, scale.rates[i], steps, budget) for i in order]


def best_rate(scale: Scale, budget: float, form: str, logs: dict[str, Log]) -> float | None:
    """The rate of the least held-out loss of a form's sweep; None while a run of it is missing."""
    runs = sweep(scale, budget, ALL_FORMS[form].rate_of or form)
    losses = {run.lr: final(logs.get(run.name)) for run in runs}
    if any(loss is None for loss in losses.values()):
        return None
    return min(losses, key=lambda lr: losses[lr])  # type: ignore[arg-type, return-value]


def step_ms(size: str, form: str, logs: dict[str, Log]) -> float | None:
    """Milliseconds of a step, of the run that was alone on its GPU for them."""
    log = logs.get(f"{size}-timing-{form}")
    return log["step_ms"] if log and log["finished"] else None


def _at_best(run: Planned, scale: Scale, logs: dict[str, Log], factor: float = 1.0) -> Planned:
    """The run at the best rate of its form, or waiting for its sweep."""
    rate = best_rate(scale, run.budget, run.form, logs)
    if rate is None:
        return replace(run, waits_for=f"the sweep of {ALL_FORMS[run.form].rate_of or run.form}")
    return replace(run, lr=float(f"{rate * factor:.3g}"))


def _at_equal_time(run: Planned, scale: Scale, logs: dict[str, Log]) -> Planned:
    """The run at the best rate, with the steps that the plain form's GPU time lasts."""
    run = _at_best(run, scale, logs)
    plain, own = (step_ms(run.size, form, logs) for form in ("vanilla", run.form))
    if plain is None or own is None:
        wait = ", ".join(filter(None, [run.waits_for, f"timings of vanilla and {run.form}"]))
        return replace(run, steps=None, waits_for=wait)
    assert run.steps is not None
    return replace(run, steps=max(1, round(run.steps * plain / own)))


def plan(scale: Scale, budget: float, logs: Iterable[Log] = ()) -> list[Planned]:
    """Every run of the experiment, the most telling first.

    Args:
        budget: tokens a parameter of the plain form.
        logs: of runs of this budget and data, and timings.
    """
    known = by_name(logs)
    small = scale.smallest
    size = scale.sizes[small]
    sweeps = {form: sweep(scale, budget, form) for form in size.forms}

    def timing(form: str, of: str = small) -> Planned:
        return Planned("timing", of, form, 1, scale.rates[scale.middle], TIMED_STEPS, 0)

    first = ("vanilla", "mhc4")
    others = [form for form in size.forms if form not in first]
    runs = [sweeps[form][0] for form in first]
    runs += [sweeps[form][0] for form in others[:2]]
    runs += [run for i in range(1, len(scale.rates)) for run in (sweeps[form][i] for form in first)]
    # One after the other: a timing waits until its GPU is free.
    runs += [timing(form) for form in (*first, *others[:2])]
    runs += [run for form in others[:2] for run in sweeps[form][1:]]
    runs += [run for form in others[2:] for run in sweeps[form]]
    runs += [timing(form) for form in others[2:]]
    steps = size.steps(budget)

    def at_best(study: str, form: str, seed: int) -> Planned:
        return _at_best(Planned(study, small, form, seed, None, steps, budget), scale, known)

    runs += [at_best("seeds", form, seed) for seed in size.seeds[1:] for form in size.forms]
    runs += [
        _at_equal_time(Planned("time", small, form, seed, None, steps, budget), scale, known)
        for seed in size.seeds
        for form in size.forms
        if form != "vanilla"
    ]
    for study in scale.studies:
        runs += [at_best(study, form, seed) for seed in size.seeds for form in STUDIES[study]]
    runs += [timing(form) for form in STREAMS if "streams" in scale.studies]
    for name in list(scale.sizes)[1:]:
        larger = scale.sizes[name]
        factor, steps = size.hidden / larger.hidden, larger.steps(budget)
        runs += [timing(form, name) for form in larger.forms]
        runs += [
            _at_best(Planned("size", name, form, seed, None, steps, budget), scale, known, factor)
            for seed in larger.seeds
            for form in larger.forms
        ]
    return runs


def estimate(run: Planned, scale: Scale, logs: dict[str, Log]) -> float:
    """GPU hours that a run takes, by its timing where there is one, else by a guess."""
    size = scale.sizes[run.size]
    ms = step_ms(run.size, run.form, logs)
    if ms is None:
        ms = 1000 * size.batch * size.sequence / size.rate * ALL_FORMS[run.form].cost
    return (run.steps or size.steps(run.budget)) * ms / 3.6e6
