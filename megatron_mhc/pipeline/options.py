"""What the overlapping schedule follows from a model's configuration, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.pipeline.plans import FUSED, INTERLEAVED, OVERLAPPED
from megatron_mhc.pipeline.program import SPLIT
from megatron_mhc.pipeline.queues import check_queues
from megatron_mhc.stages import layer_counts

# (Megatron setting, when it is refused, what to do instead)
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("variable_seq_lengths", bool, "messages have one shape; pack sequences to one length"),
    ("num_microbatches_with_partial_activation_checkpoints", lambda v: v is not None, "drop it"),
    ("moe_paged_stash", bool, "drop it"),
    ("hybrid_context_parallel", bool, "drop it"),
)


_NOT_FUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("recompute_granularity", lambda v: v == "full", "use --mhc-recompute-layer-num auto"),
    ("recompute_modules", lambda v: "moe" in (v or []), "recompute moe_act or nothing of the experts"),
    ("moe_shared_expert_overlap", bool, "drop it: the schedule hides the all-to-alls itself"),
    ("moe_token_dispatcher_type", lambda v: v == "flex", "use alltoall"),
    ("overlap_dispatch_backward_with_experts_wgrad", bool, "drop it"),
    ("mlp_chunks_for_training", lambda v: (v or 1) > 1, "drop it"),
)

_NOT_DELAYED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    # Its linears are no modules of the model: their queues would not be found.
    ("use_transformer_engine_op_fuser", bool, "drop it"),
    # The second of its linears runs on the stream of the MLP's post_res, the weight gradients do not.
    ("moe_latent_size", bool, "drop it"),
    # Megatron's hook of a weight that one micro-batch uses twice asks for two gradients, and finds one.
    ("mtp_use_repeated_layer", bool, "drop it"),
)


def check_config(config: Any, mhc: MHCConfig) -> None:
    """Refuse at build time what the overlapping schedules do not do.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    schedule = f"{flag('pipeline_schedule')} {mhc.pipeline_schedule}"
    _check_delayed_weights(config, mhc)
    if mhc.pipeline_schedule not in OVERLAPPED:
        if mhc.pp_boundary == SPLIT:
            raise ValueError(
                f"{flag('pp_boundary')} {SPLIT} needs {flag('pipeline_schedule')} {INTERLEAVED} or {FUSED}: "
                "Megatron's schedule sends one message for each boundary"
            )
        return
    _refuse(config, _REFUSED, schedule, f"{flag('pipeline_schedule')} megatron")
    if config.pipeline_model_parallel_size == 1:
        return
    from megatron.core import parallel_state

    # The engine asks again: a training loop may have groups of its own, or none yet.
    check_queues(mhc.pipeline_schedule, parallel_state.get_pipeline_model_parallel_group(False))
    if mhc.pipeline_schedule == FUSED:
        _refuse(config, _NOT_FUSED, schedule, f"{flag('pipeline_schedule')} {INTERLEAVED}")
        if (empty := _stage_without_layer(config, beyond_last=0)) is not None:
            raise ValueError(
                f"{schedule} goes layer by layer, and stage {empty} has none: give it one in "
                f"--pipeline-model-parallel-layout, or use {flag('pipeline_schedule')} {INTERLEAVED}"
            )
    if mhc.pp_boundary != SPLIT:
        return
    if config.recompute_granularity == "full":
        raise ValueError(
            f"{flag('pp_boundary')} {SPLIT} does not support --recompute-granularity full, whose replay runs "
            f"the last layer as a whole: use {flag('recompute_layer_num')} auto with --recompute-granularity "
            f"selective, or {flag('pp_boundary')} whole"
        )
    if (empty := _stage_without_layer(config, beyond_last=1)) is not None:
        raise ValueError(
            f"{flag('pp_boundary')} {SPLIT} cuts the last MLP of every stage but the last, and stage {empty} "
            "has no layer: give it one in --pipeline-model-parallel-layout, or use "
            f"{flag('pp_boundary')} whole"
        )


def _check_delayed_weights(config: Any, mhc: MHCConfig) -> None:
    """Refuse weight gradients that nobody would compute: only a fused step asks the linears for them."""
    name = "--delay-wgrad-compute"
    if not getattr(config, "delay_wgrad_compute", False):
        return
    fused = f"{flag('pipeline_schedule')} {FUSED}"
    if mhc.pipeline_schedule != FUSED:
        raise ValueError(
            f"{flag('pipeline_schedule')} {mhc.pipeline_schedule} does not support {name} True: it would "
            f"never compute what the linears have put off; use {fused}, or drop it"
        )
    if config.pipeline_model_parallel_size == 1:
        raise ValueError(
            f"{name} True needs a pipeline: without one, Megatron's own schedule runs instead of {fused} and "
            "would never compute what the linears have put off; give --pipeline-model-parallel-size 2 or "
            "more, or drop it"
        )
    _refuse(config, _NOT_DELAYED, f"{fused} with {name}", f"{fused} without {name}")


def _refuse(
    config: Any, table: tuple[tuple[str, Callable[[Any], bool], str], ...], schedule: str, instead: str
) -> None:
    for name, refused, remedy in table:
        if refused(value := getattr(config, name, None)):
            raise ValueError(
                f"{schedule} does not support --{name.replace('_', '-')} {value}: {remedy}, or use {instead}"
            )


def _stage_without_layer(config: Any, beyond_last: int) -> int | None:
    counts = layer_counts(config)
    return next((i for i, count in enumerate(counts[: len(counts) - beyond_last]) if not count), None)


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
