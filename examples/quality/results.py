"""What kept logs say of an experiment: best learning rates, losses, and gaps seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from plan import ALL_FORMS, Log, Planned, Scale, best_rate, by_name, final, plan, sweep

MAIN_BUDGET = 20
# Two-sided 95 % quantiles of Student's t, by degrees of freedom: with how few seeds a gap is a difference.
QUANTILE = {1: 12.7, 2: 4.30, 3: 3.18, 4: 2.78}


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
    if not all(map(math.isfinite, values)):  # of gaps perhaps of either sign, or none
        return Estimate(math.inf, math.nan, len(values))
    if len(values) == 1:
        return Estimate(values[0], math.nan, 1)
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))


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
