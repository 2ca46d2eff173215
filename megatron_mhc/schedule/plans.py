"""The plan of a step that a model's configuration asks for; no torch."""

from __future__ import annotations

from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.schedule.program import SPLIT, WHOLE, Plan
from megatron_mhc.schedule.stages import layer_counts

AUTO, MEGATRON = "auto", "megatron"
INTERLEAVED, FUSED = OVERLAPPED = ("interleaved", "fused")


def plan_for(
    config: Any, mhc: MHCConfig, pp: int, chunks: int, microbatches: int, forward_only: bool = False
) -> Plan:
    """The plan of one step; more chunks than one run in groups of microbatch_group_size_per_vp_stage.

    Raises:
        ValueError: a group larger than the step.
    """
    group = None
    if chunks > 1:
        group = config.microbatch_group_size_per_vp_stage
        group = None if group is None or group <= pp else group
        if group is not None and group > microbatches:
            raise ValueError(
                f"--microbatch-group-size-per-virtual-pipeline-stage {group}: a step has {microbatches} "
                f"micro-batches; give {pp} to {microbatches}"
            )
    fused = mhc.pipeline_schedule == FUSED and not forward_only
    return Plan(
        pp,
        chunks,
        microbatches,
        group=group,
        boundary=SPLIT if mhc.pp_boundary == SPLIT else WHOLE,
        forward_only=forward_only,
        fused=fused,
        layers=layer_counts(config) if fused else 1,
        hops=1 if chunks == 1 and mhc.pipeline_schedule not in OVERLAPPED else 2,
        replay=not forward_only and mhc.recompute_layer_num != "off",
    )


def is_combined(config: Any, mhc: MHCConfig) -> bool:
    """Whether Megatron's combined 1F1B trains the model: a forward beside the backward of the pass before it.

    --overlap-moe-expert-parallel-comm asks for it; on a pipeline `fused` does so in its place.
    """
    alone = config.pipeline_model_parallel_size == 1
    return bool(config.overlap_moe_expert_parallel_comm and (alone or mhc.pipeline_schedule == MEGATRON))


def passes_in_flight(config: Any, mhc: MHCConfig, rank: int, microbatches: int | None = None) -> int:
    """Most passes of model chunks that a pipeline rank has run forward and not yet backward.

    Args:
        microbatches: of one step; None if unknown, as many as fill the pipeline.
    """
    pp, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if microbatches is None:
        microbatches = 2 * max(pp, config.microbatch_group_size_per_vp_stage or 0)
    # Without a pipeline Megatron runs it without a schedule of ours.
    held = 1 if pp == 1 else plan_for(config, mhc, pp, chunks, microbatches).in_flight(rank)
    return min(held + 1, chunks * microbatches) if is_combined(config, mhc) else held
