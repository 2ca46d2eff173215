"""What the schedules of a pipeline refuse of Megatron's settings, in rows like `megatron_mhc.refusals`."""

from __future__ import annotations

from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.refusals import Refusal, empty_stage, setting_row, setting_rows

# Under --delay-wgrad-compute, but not in Megatron's combined 1F1B: only a fused step asks the linears for
# what they have put off.
DELAYED = (
    Refusal(
        lambda config, mhc: mhc.pipeline_schedule != "fused",
        "--mhc-pipeline-schedule {mhc.pipeline_schedule} does not support --delay-wgrad-compute True without "
        "--overlap-moe-expert-parallel-comm",
        "it would never compute what the linears have put off; add that, use --mhc-pipeline-schedule fused, "
        "or drop it",
    ),
    Refusal(
        lambda config, mhc: config.pipeline_model_parallel_size == 1,
        "--delay-wgrad-compute True needs a pipeline or --overlap-moe-expert-parallel-comm",
        "without both, no schedule would compute what the linears have put off; give "
        "--pipeline-model-parallel-size 2 or more, or drop it",
    ),
    *setting_rows(
        "--mhc-pipeline-schedule fused with --delay-wgrad-compute does not support {flag} {value}",
        "--mhc-pipeline-schedule fused without --delay-wgrad-compute",
        # Its linears are no modules of the model: their queues would not be found.
        ("use_transformer_engine_op_fuser", "drop it"),
        # Megatron's hook of a weight that one micro-batch uses twice asks for two gradients, and finds one.
        ("mtp_use_repeated_layer", "drop it"),
    ),
)

# The schedules: Megatron's, the two that overlap, and of these `fused`; then the `split` boundary.
MEGATRONS_SCHEDULE = (
    Refusal(
        lambda config, mhc: mhc.pp_boundary == "split",
        "--mhc-pp-boundary split needs --mhc-pipeline-schedule interleaved or fused",
        "Megatron's schedule sends one message for each boundary",
    ),
)


def _graphs_of_a_stage(config: Any, mhc: MHCConfig) -> str | None:
    asked = config.cuda_graph_impl not in (None, "none") and config.pipeline_model_parallel_size > 1
    return config.cuda_graph_impl if asked else None


def _layers_in_nodes(config: Any, mhc: MHCConfig) -> bool:
    asked = config.overlap_moe_expert_parallel_comm and config.pipeline_model_parallel_size > 1
    return bool(asked and mhc.pipeline_schedule == "interleaved")


OVERLAPPED = (
    Refusal(
        _layers_in_nodes,
        "--mhc-pipeline-schedule interleaved does not support --overlap-moe-expert-parallel-comm True",
        "it runs layers as a whole; use --mhc-pipeline-schedule fused or megatron, or drop it",
    ),
    *setting_rows(
        "--mhc-pipeline-schedule {mhc.pipeline_schedule} does not support {flag} {value}",
        "--mhc-pipeline-schedule megatron",
        ("variable_seq_lengths", "messages have one shape; pack sequences to one length"),
        ("mtp_standalone", "the message from MTP to the loss has another shape; put both on the last stage"),
        ("num_microbatches_with_partial_activation_checkpoints", "drop it", lambda v: v is not None),
        ("moe_paged_stash", "drop it"),
        # Its chunks come back in the order of Megatron's schedule.
        ("fine_grained_activation_offloading", "drop it"),
        ("hybrid_context_parallel", "drop it"),
    ),
    Refusal(
        _graphs_of_a_stage,
        "--mhc-pipeline-schedule {mhc.pipeline_schedule} does not support --cuda-graph-impl {value} on a "
        "pipeline",
        "it sends what a graph has written while the next one writes over it; use --mhc-pipeline-schedule "
        "megatron, or drop it",
    ),
)
FUSED = (
    *setting_rows(
        "--mhc-pipeline-schedule fused does not support {flag} {value}",
        "--mhc-pipeline-schedule interleaved",
        ("recompute_granularity", "use --mhc-recompute-layer-num auto", lambda v: v == "full"),
        ("recompute_modules", "recompute moe_act or nothing of the experts", lambda v: "moe" in (v or [])),
        ("moe_shared_expert_overlap", "drop it: the schedule hides the all-to-alls itself"),
        ("moe_token_dispatcher_type", "use alltoall", lambda v: v == "flex"),
        ("overlap_dispatch_backward_with_experts_wgrad", "drop it"),
        ("mlp_chunks_for_training", "drop it", lambda v: (v or 1) > 1),
        # Its second GEMM would run beside those of the compute stream, in the one workspace of a device.
        ("moe_latent_size", "drop it"),
    ),
    Refusal(
        empty_stage(slice(None)),
        "--mhc-pipeline-schedule fused goes layer by layer, and stage {value} has none",
        "give it one in --pipeline-model-parallel-layout, or use --mhc-pipeline-schedule interleaved",
    ),
)
SPLIT = (
    setting_row(
        "recompute_granularity",
        "use --mhc-recompute-layer-num auto with --recompute-granularity selective, or --mhc-pp-boundary "
        "whole",
        lambda v: v == "full",
        "--mhc-pp-boundary split does not support {flag} full, whose replay runs the last layer as a whole",
    ),
    Refusal(
        empty_stage(slice(-1)),
        "--mhc-pp-boundary split cuts the last MLP of every stage but the last, and stage {value} has no "
        "layer",
        "give it one in --pipeline-model-parallel-layout, or use --mhc-pp-boundary whole",
    ),
)
