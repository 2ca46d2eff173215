"""One step of a pipeline rank: what Megatron's `forward_backward_func` is for mHC models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_mhc.carried import options_of
from megatron_mhc.pipeline.fused import FusedStep
from megatron_mhc.pipeline.options import check_call
from megatron_mhc.pipeline.queues import check_queues
from megatron_mhc.pipeline.step import Step
from megatron_mhc.schedule.plans import plan_for


def forward_backward(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any] | list[Any],
    model: torch.nn.Module | list[torch.nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
    p2p_communicator: Any = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool | None = False,
) -> list[Any]:
    """Megatron's `forward_backward_func` for mHC models on a pipeline; arguments and result are its own.

    Raises:
        ValueError: arguments that this schedule does not serve, or one hardware queue, naming the remedy.
        PipelineError: a neighbour failed or was silent for --distributed-timeout-minutes.
    """
    chunks = model if isinstance(model, list) else [model]
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator] * len(chunks)
    config = get_model_config(chunks[0])
    if (mhc := options_of(chunks, config)) is None:
        raise ValueError("the model has no mHC: run it by what Megatron's get_forward_backward_func returns")
    check_call(config, seq_length, decoder_seq_length, adjust_tensor_shapes_fn, p2p_communicator)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    check_queues(mhc, groups.pp)
    rank = groups.pp.rank()
    plan = plan_for(config, mhc, groups.pp.size(), len(chunks), num_microbatches, forward_only)
    last_rank = rank == plan.pp - 1
    finalize = None if forward_only else config.finalize_model_grads_func
    embedding = None
    if finalize is not None:
        embedding = schedules.clear_embedding_activation_buffer(config, chunks, last_rank)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

    step = (FusedStep if plan.fused else Step)(
        plan,
        rank,
        chunks,
        iterators,
        forward_step_func,
        groups,
        (seq_length, micro_batch_size),
        collect_non_loss_data=collect_non_loss_data,
        first_val_step=first_val_step,
    )
    step.run()

    if finalize is not None:
        schedules.finish_embedding_wgrad_compute(config, embedding, last_rank, groups.tp)
        tokens = step.num_tokens if config.calculate_per_token_loss else None
        finalize(chunks, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return step.reports
