"""What tensor, sequence, context, expert and pipeline parallelism ask of mHC, and what is refused.

Mapping parameters are replicated over TP. Every reduction is one that Megatron already performs:

    TP            inputs are replicated, so gradients are equal on all ranks: nothing to reduce
    TP + SP       each rank sees its tokens: `sequence_parallel` marks them, and
                  finalize_model_grads sums them over TP
    CP, DP, EP    ordinary non-expert parameters: DDP reduces over the data x context group
    PP, VPP       a layer lives on one stage: nothing to reduce
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.stages import layer_counts


def mark_replicated(module: nn.Module, config: TransformerConfig) -> None:
    """Mark a module's parameters as replicated over TP, to be summed over it under sequence parallel."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


# (Megatron setting, when it is refused, what to do instead); flags are spelled as on the command line.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("fp32_residual_connection", bool, "drop it: coefficients are applied in fp32 already"),
    ("cuda_graph_impl", lambda v: v not in (None, "none"), "drop it: graphs capture one-stream inputs"),
    ("enable_cuda_graph", bool, "drop it: graphs capture one-stream inputs"),
    ("external_cuda_graph", bool, "drop it: graphs capture one-stream inputs"),
    ("cpu_offloading", bool, "drop it, and use --recompute-granularity to save memory"),
    ("fine_grained_activation_offloading", bool, "drop it, and use --recompute-granularity to save memory"),
    ("inference_fuse_tp_communication", bool, "drop it: it adds the residual inside a linear layer"),
    ("transformer_impl", lambda v: v == "inference_optimized", "use transformer_engine or local"),
    ("heterogeneous_block_specs", bool, "use layers of one kind (MoE frequency lists are fine)"),
    ("is_hybrid_model", bool, "use a GPT model: Mamba layers are not wrapped"),
    ("mtp_standalone", bool, "put the MTP layer on the stage of the last decoder layer and the loss"),
)


def validate(config: TransformerConfig, mhc: MHCConfig) -> None:
    """Refuse at build time what would fail later or train silently wrong.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    for name, refused, remedy in _REFUSED:
        value = getattr(config, name, None)
        if refused(value):
            raise ValueError(f"mHC does not support --{name.replace('_', '-')} {value}: {remedy}")
    # It asks for Megatron's combined 1F1B, in whose place `fused` runs; --delay-wgrad-compute asks for it.
    fused = mhc.pipeline_schedule == "fused" and config.pipeline_model_parallel_size > 1
    if config.overlap_moe_expert_parallel_comm and not fused:
        raise ValueError(
            "mHC does not support --overlap-moe-expert-parallel-comm True: Megatron's schedule takes the "
            f"layer apart; use {flag('pipeline_schedule')} fused on a pipeline, or drop it"
        )
    two_with_chunks = config.pipeline_model_parallel_size == 2 and config.virtual_pipeline_model_parallel_size
    if two_with_chunks and mhc.pipeline_schedule == "megatron":
        if not config.overlap_p2p_comm or config.batch_p2p_comm:
            # Two messages between the same two ranks in one batch may be swapped; stock Megatron
            # checks this on the command line alone, and otherwise trains on the wrong tensors.
            raise ValueError(
                "--pipeline-model-parallel-size 2 with virtual stages and without overlapped p2p exchanges "
                "the wrong tensors: set overlap_p2p_comm=True and batch_p2p_comm=False (drop "
                "--no-overlap-p2p-communication), or use 1 virtual stage"
            )
    if config.recompute_granularity == "selective" and "mlp" in (config.recompute_modules or []):
        if config.add_bias_linear:
            # Stock Megatron: the recomputed MLP's output bias re-enters its own backward without end.
            raise ValueError(
                "--recompute-modules mlp with linear biases hangs in backward: add --disable-bias-linear, "
                "or recompute without mlp"
            )
    if mhc.recompute_layer_num != "off" and config.recompute_granularity == "full":
        raise ValueError(
            f"{flag('recompute_layer_num')} {mhc.recompute_layer_num} with --recompute-granularity full, "
            f"which drops and replays the streams already: drop {flag('recompute_layer_num')}, or use "
            "--recompute-granularity selective"
        )


def validate_stages(config: TransformerConfig) -> None:
    """Refuse pipeline layouts whose first stage cannot expand or whose streams outlive the final norm.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    if config.pipeline_model_parallel_size == 1:
        return
    counts = layer_counts(config)
    if counts[0] == 0:
        raise ValueError(
            "mHC expands the embedding in the first decoder layer, but pipeline stage 0 has none: drop "
            "--account-for-embedding-in-pipeline-split, or give stage 0 a layer in "
            "--pipeline-model-parallel-layout"
        )
    if config.mtp_num_layers and counts[-1] == 0:
        raise ValueError(
            "with --mtp-num-layers the streams end at the last decoder layer, which must be on the last "
            "pipeline stage: drop --account-for-loss-in-pipeline-split, or give that stage a decoder layer"
        )
