"""Diagnostics in Megatron's own training loop: which steps, where they are written, and the alarm."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import log_single_rank

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.diagnostics.report import PARTS, Report

logger = logging.getLogger(__name__)

# Statistics whose worst sub-layer stands for the whole model, and which end is the worse one.
WORST: dict[str, Callable[[list[float]], float]] = {
    "gain_forward": max,
    "gain_backward": max,
    "composite_gain_forward": max,
    "composite_gain_backward": max,
    "row_error": max,
    "column_error": max,
    "norm_ratio": max,
    "cosine": max,
    "effective_rank": min,
    **{f"logit_{part}_max": max for part in PARTS},
    **{f"logit_{part}_min": min for part in PARTS},
}
GAINS = ("gain_forward", "gain_backward", "composite_gain_forward", "composite_gain_backward")


def check_writers(args: Any, mhc: MHCConfig) -> None:
    """Refuse to sample where nobody writes the result.

    Raises:
        ValueError: `--mhc-log-interval` with neither a writer nor an alarm.
    """
    writers = getattr(args, "tensorboard_dir", None) or getattr(args, "wandb_project", None)
    if mhc.log_interval and mhc.alarm == "off" and not writers:
        raise ValueError(
            f"{flag('log_interval')} {mhc.log_interval} has nowhere to write: add --tensorboard-dir, "
            f"--wandb-project or {flag('alarm')} warn"
        )


def check_loop(mhc: MHCConfig) -> None:
    """Refuse diagnostics that would never be taken.

    Raises:
        ValueError: `log_interval` where no run of megatron.training is under way, whose `train_step`, the
            one that is sampled, needs its parsed arguments.
    """
    if mhc.log_interval and not _in_megatrons_run():
        raise ValueError(
            f"log_interval={mhc.log_interval} samples steps of megatron.training's own loop, and none is "
            "being set up: drop log_interval and alarm; in a loop of your own run a step inside "
            "`with megatron_mhc.diagnostics.Sampler(model, config) as sampler`, then read sampler.report()"
        )


def _in_megatrons_run() -> bool:
    from megatron.training import get_args

    try:
        get_args()
    except AssertionError:
        return False
    return True


def scalars(report: Report) -> dict[str, float]:
    """Names and values for the writers: `mhc/<statistic>` of the worst sub-layer, and
    `mhc/<statistic>/layer_001_attention` of each."""
    named = {
        f"mhc/{name}": worst(name, values) for name, values in report.statistics.items() if name in WORST
    }
    for name, values in report.statistics.items():
        pairs = zip(report.sublayers, values, strict=True)
        named |= {f"mhc/{name}/{sublayer}": value for sublayer, value in pairs}
    return named


def worst(name: str, values: list[float]) -> float:
    """The value of the worst sub-layer; NaN where one is NaN."""
    return math.nan if any(map(math.isnan, values)) else WORST[name](values)


def write(report: Report, step: int, tensorboard: Any, wandb: Any) -> None:
    """Write a report; Megatron has its writers on one rank, and None on the others.

    TensorBoard also gets `mhc/h_res` and `mhc/composite`, tensors [L, n, n] for `megatron_mhc.plot`.
    """
    named = scalars(report) if tensorboard or wandb else {}
    if tensorboard:
        add_scalars(tensorboard, named, step)
        tensorboard.add_tensor("mhc/h_res", torch.tensor(report.h_res), step)
        tensorboard.add_tensor("mhc/composite", torch.tensor(report.composite), step)
    if wandb:
        wandb.log(named, step)


def add_scalars(tensorboard: Any, named: dict[str, float], step: int) -> None:
    """Add all scalars in one event: an event each would cost more than all the rest of a logging step."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    if not isinstance(tensorboard, SummaryWriter):
        for name, value in named.items():
            tensorboard.add_scalar(name, value, step)
        return
    values = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
    tensorboard._get_file_writer().add_summary(Summary(value=values), step)


def sound(report: Report, mhc: MHCConfig, raised: set[str], step: int) -> str | None:
    """Log what is out of range, see `out_of_range`.

    Returns:
        the remedy, which is logged too, where training is to stop: on all ranks alike.
    """
    messages = out_of_range(report, mhc, raised)
    for message in messages:
        log_single_rank(logger, logging.WARNING, f"mHC alarm at step {step}: {message}")
    if not messages or mhc.alarm != "stop":
        return None
    remedy = f"stopping without saving; resume from an earlier checkpoint, or {flag('alarm')} warn"
    log_single_rank(logger, logging.WARNING, f"mHC alarm: {remedy}")
    return remedy


def out_of_range(report: Report, mhc: MHCConfig, raised: set[str]) -> list[str]:
    """Say what leaves the ranges of `--mhc-alarm-gain` and `--mhc-alarm-logit`, each once in a run.

    Args:
        raised: which of `gain` and `logit` were said before; grows.
    """
    if mhc.alarm == "off":
        return []
    logits = tuple(name for name in report.statistics if name.startswith("logit_"))
    kinds = {
        "gain": (GAINS, 1 / mhc.alarm_gain, mhc.alarm_gain),
        "logit": (logits, -mhc.alarm_logit, mhc.alarm_logit),
    }
    messages = []
    for kind, (names, low, high) in kinds.items():
        values = [(name, i, value) for name in names for i, value in enumerate(report.statistics[name])]
        # Written so that NaN, which compares with nothing, is outside.
        outside = [entry for entry in values if not low <= entry[2] <= high]
        if not outside or kind in raised:
            continue
        raised.add(kind)
        name, i, value = max(outside, key=lambda entry: distance(entry[2], kind))
        messages.append(
            f"{name} {value:.4g} of {report.sublayers[i]} is outside [{low:.4g}, {high:.4g}] "
            f"({flag('alarm_' + kind)}), the worst of {len({i for _, i, _ in outside})} sub-layers"
        )
    return messages


def distance(value: float, kind: str) -> float:
    """How far out of range a value is, to find the worst; NaN is farthest."""
    if math.isnan(value) or (kind == "gain" and value <= 0):
        return math.inf
    return abs(math.log(value)) if kind == "gain" else abs(value)
