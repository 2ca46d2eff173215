"""Diagnostics in Megatron's own training loop: which steps, where they are written, and the alarm."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.utils import log_single_rank

from megatron_mhc.carried import options_of
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.diagnostics.report import PARTS, Report, sublayer_name
from megatron_mhc.diagnostics.sampler import Sampler

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
    """Refuse to sample for nobody.

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


def sample_steps(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `megatron.training.training.train_step` so that every `--mhc-log-interval`-th step is sampled.

    The first micro-batch of the step is what is sampled. Other steps run as they are: the model has
    forward hooks during sampled steps only.
    """
    raised: set[str] = set()

    def train_and_sample(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int | None = None,
        **groups: Any,
    ) -> Any:
        def step() -> Any:
            return train_step(
                forward_step_func,
                data_iterator,
                model,
                optimizer,
                opt_param_scheduler,
                config,
                forward_backward_func,
                iteration=iteration,
                **groups,
            )

        mhc = options_of(model, config)
        # Megatron counts the step that begins here from 0, and logs it from 1.
        if mhc is None or not mhc.log_interval or iteration is None or (iteration + 1) % mhc.log_interval:
            return step()
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        with Sampler(model, config) as sampler:
            result = step()
        report = sampler.report()
        write(report, iteration + 1, get_tensorboard_writer(), get_wandb_writer())
        messages = out_of_range(report, mhc, raised)
        for message in messages:
            log_single_rank(logger, logging.WARNING, f"mHC alarm at step {iteration + 1}: {message}")
        if messages and mhc.alarm == "stop":
            remedy = f"stopping without saving; resume from an earlier checkpoint, or {flag('alarm')} warn"
            log_single_rank(logger, logging.WARNING, f"mHC alarm: {remedy}")
            # should_exit and exit_code: the loop ends as it does on a signal, on all ranks alike.
            return (*result[:3], True, 1, *result[5:])
        return result

    return train_and_sample


def scalars(report: Report) -> dict[str, float]:
    """Names and values for the writers: `mhc/<statistic>` of the worst sub-layer, and
    `mhc/<statistic>/layer_001_attention` of each."""
    named = {
        f"mhc/{name}": worst(name, values) for name, values in report.statistics.items() if name in WORST
    }
    for name, values in report.statistics.items():
        named |= {f"mhc/{name}/{sublayer_name(i)}": value for i, value in enumerate(values)}
    return named


def worst(name: str, values: list[float]) -> float:
    """The value of the worst sub-layer; NaN where one is NaN."""
    return math.nan if any(map(math.isnan, values)) else WORST[name](values)


def write(report: Report, step: int, tensorboard: Any, wandb: Any) -> None:
    """Write a report; Megatron has its writers on one rank, and None on the others.

    TensorBoard also gets `mhc/h_res` and `mhc/composite`, tensors [L, n, n] for `scripts/plot_mhc.py`.
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
            f"{name} {value:.4g} of {sublayer_name(i)} is outside [{low:.4g}, {high:.4g}] "
            f"({flag('alarm_' + kind)}), the worst of {len({i for _, i, _ in outside})} sub-layers"
        )
    return messages


def distance(value: float, kind: str) -> float:
    """How far out of range a value is, to find the worst; NaN is farthest."""
    if math.isnan(value) or (kind == "gain" and value <= 0):
        return math.inf
    return abs(math.log(value)) if kind == "gain" else abs(value)
