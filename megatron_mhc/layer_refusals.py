"""What mHC refuses of a layer that is built, and of what its CUDA graph holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_mhc.config import MHCConfig
from megatron_mhc.refusals import Refusal
from megatron_mhc.releases import release


def _replayed_by_layers(layer: Any, mhc: MHCConfig) -> str | None:
    return mhc.recompute_layer_num if any(layer.held) and mhc.recompute_layer_num != "off" else None


def _without_gradients(layer: Any, mhc: MHCConfig) -> str | None:
    # Stock Megatron: a local graph asks for gradients of the parameters that autograd knows, and Megatron's
    # checkpoint of a module keeps its parameters to itself.
    if layer.config.cuda_graph_impl != "local":
        return None
    routed = hasattr(layer, "cudagraph_manager_router")
    if layer.held.attention and layer.recompute_input_layernorm:
        return "layernorm"
    if (layer.held.mlp or routed) and layer.recompute_pre_mlp_layernorm:
        return "layernorm"
    up_projection = layer.held.attention and getattr(layer.self_attention, "recompute_up_proj", False)
    return "mla_up_proj" if up_projection else None


def _graph_in_nodes(layer: Any, mhc: MHCConfig) -> str | None:
    config = layer.config
    return config.cuda_graph_impl if any(layer.held) and config.overlap_moe_expert_parallel_comm else None


def _attention_of_nodes(layer: Any, mhc: MHCConfig) -> bool:
    # Stock Megatron: an AttributeError of the first step.
    lacks = getattr(layer, "self_attention_hyper_connection", layer) is None
    return bool(lacks and layer.config.overlap_moe_expert_parallel_comm)


def _of_heads(layer: Any, mhc: MHCConfig) -> int | None:
    # Stock Megatron: the output norm of a rank's heads, whose gradient is summed as a sequence's alone.
    size, config = layer.config.tensor_model_parallel_size, layer.config
    has_norm = hasattr(getattr(layer, "self_attention", None), "out_norm")
    return size if has_norm and size > 1 and not config.sequence_parallel else None


def _lacking(found: Callable[[Any, MHCConfig], Any], what: str, remedy: str) -> Refusal:
    """A row of a GPTModel's layers without attention or without an MLP."""
    return Refusal(
        lambda layer, mhc: found(layer, mhc) if len(layer.connections()) < layer.chunk.each else None,
        f"{what} does not support layers without attention or without an MLP",
        remedy,
    )


# A built layer, whose `held` is what its CUDA graph holds of it.
LAYER = (
    Refusal(
        lambda layer, mhc: len(layer.connections()) > layer.chunk.each,
        "a layer of a HybridModel with both attention and an MLP",
        "give its stack two layers instead: mHC has one connection for each",
    ),
    Refusal(
        _replayed_by_layers,
        "--mhc-recompute-layer-num {value} with CUDA graphs of single layers",
        "each of which keeps the streams that it reads, so that none are dropped; use --cuda-graph-impl "
        "full_iteration, or --recompute-granularity selective, or drop it",
    ),
    Refusal(
        _without_gradients,
        "--recompute-modules {value} with --cuda-graph-impl local leaves its parameters without a gradient",
        "recompute without it, or use --cuda-graph-impl transformer_engine",
    ),
    Refusal(
        lambda layer, mhc: layer.held.router and not release().te_router_graphs,
        "--cuda-graph-impl transformer_engine with --cuda-graph-modules moe_router under Megatron-Core 0.18",
        "its graphs hand on nothing of ours behind the router; drop moe_router, or install 0.19",
    ),
    Refusal(
        _graph_in_nodes,
        "mHC does not support --cuda-graph-impl {value} with --overlap-moe-expert-parallel-comm",
        "its graph of a layer runs what lies in several nodes; use --cuda-graph-impl none, or drop the other",
    ),
    Refusal(
        _attention_of_nodes,
        "--overlap-moe-expert-parallel-comm {value} does not support layers without attention",
        "Megatron's nodes ask each layer's attention for its weight gradients; drop it",
    ),
    Refusal(
        _of_heads,
        "gated delta nets with --tensor-model-parallel-size {value}",
        "Megatron does not sum the gradients of their output norm over the ranks, whose weights drift apart; "
        "add --sequence-parallel",
    ),
    _lacking(
        lambda layer, mhc: mhc.recompute_layer_num != "off",
        "--mhc-recompute-layer-num {mhc.recompute_layer_num}",
        "use Megatron's --recompute-granularity, or drop it",
    ),
    _lacking(
        lambda layer, mhc: mhc.pipeline_schedule == "fused" or mhc.pp_boundary == "split",
        "--mhc-pipeline-schedule {mhc.pipeline_schedule} --mhc-pp-boundary {mhc.pp_boundary}",
        "use --mhc-pp-boundary whole, with --mhc-pipeline-schedule interleaved or megatron",
    ),
    _lacking(
        lambda layer, mhc: mhc.log_interval or None,
        "--mhc-log-interval {value}",
        "drop it: its gains are of all sub-layers",
    ),
    _lacking(
        lambda layer, mhc: layer.config.cuda_graph_impl if any(layer.held) else None,
        "--cuda-graph-impl {value}",
        "drop it",
    ),
)
