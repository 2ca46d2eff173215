"""What the overlapping schedules refuse of a model's configuration and of a step's arguments."""

from __future__ import annotations

from typing import Any

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.pipeline import refusals
from megatron_mhc.pipeline.queues import check_queues
from megatron_mhc.refusals import Refusal, refuse
from megatron_mhc.schedule.plans import FUSED, OVERLAPPED, is_combined
from megatron_mhc.schedule.program import SPLIT


def refusals_of(config: Any, mhc: MHCConfig) -> tuple[Refusal, ...]:
    """The rows that a configuration of this schedule, boundary and pipeline must not meet."""
    delayed = getattr(config, "delay_wgrad_compute", False) and not is_combined(config, mhc)
    rows = refusals.DELAYED if delayed else ()
    if mhc.pipeline_schedule not in OVERLAPPED:
        return rows + refusals.MEGATRONS_SCHEDULE
    rows += refusals.OVERLAPPED
    if config.pipeline_model_parallel_size > 1 and not config.is_hybrid_model:  # for which see `HYBRID`
        rows += refusals.FUSED if mhc.pipeline_schedule == FUSED else ()
        rows += refusals.SPLIT if mhc.pp_boundary == SPLIT else ()
    return rows


def check_config(config: Any, mhc: MHCConfig) -> None:
    """Refuse at build time what the overlapping schedules do not do.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    refuse(refusals_of(config, mhc), config, mhc)
    if mhc.pipeline_schedule in OVERLAPPED and config.pipeline_model_parallel_size > 1:
        from megatron.core import parallel_state

        # The engine asks again: a training loop may have groups of its own, or none yet.
        check_queues(mhc, parallel_state.get_pipeline_model_parallel_group(False))


def check_call(
    config: Any, seq_length: int, decoder_seq_length: int | None, adjust: Any, communicator: Any
) -> None:
    """Refuse arguments of `forward_backward_func` that the overlapping schedule does not serve.

    Raises:
        ValueError: naming the argument and the remedy.
    """
    instead = f"use {flag('pipeline_schedule')} megatron"
    if decoder_seq_length is not None and decoder_seq_length != seq_length:
        raise ValueError(f"--decoder-seq-length {decoder_seq_length}: the schedule has one length; {instead}")
    if adjust is not None:
        raise ValueError(f"adjust_tensor_shapes_fn (distillation) changes the messages' shapes: {instead}")
    if communicator is not None:
        raise ValueError(f"a p2p_communicator of the caller's own would not be used: {instead}")
    if config.pipeline_dtype is None:
        raise ValueError("config.pipeline_dtype is None: set it to the dtype of the streams, as --bf16 does")
