"""How healthy the mappings of a model are: gains, sum errors, logits, gates and streams.

    statistics.py   pure functions of matrices        report.py    reduced over all ranks
    sampler.py      forward hooks on a model          training.py  Megatron's training loop and writers

`--mhc-log-interval K` does all of it every K steps of Megatron's own loop; in a loop of your own:

    with Sampler(model, config) as sampler:
        loss = model(...)
    report = sampler.report()
"""

from megatron_mhc.diagnostics.report import Report
from megatron_mhc.diagnostics.sampler import Sampler, capture_h_res
from megatron_mhc.diagnostics.statistics import amax_gain, composite

__all__ = ["Report", "Sampler", "amax_gain", "capture_h_res", "composite"]
