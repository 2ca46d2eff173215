"""The simulator's times of a model: a layer by its FLOPs and bytes, messages by their bytes; no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_mhc.pipeline.costs import Times
from megatron_mhc.schedule.stages import with_experts

# Measured on H200s (docs/experiments/2026-11-30_push_transport.md, vanilla): compute kernels of a step run at
# 527 TFLOP/s, a GEMM of 8192 cubed at 723.
OF_A_GEMM = 0.73
# From the same: a connection's forward and backward take 0.32 ms, as 7.5 passes over its streams at 4 TB/s.
STREAMS_PER_MS = 4e9
PASSES, POST_PASSES, BACKWARD_PASSES = 2.5, 1.5, 5.0  # forward, post_res of it, backward


class Launch(NamedTuple):
    """A step as a launch asks for it: tokens of a sequence, sequences of a microbatch, microbatches.

    Args:
        others: microbatches of its other steps: of smaller batches, and of evaluation.
    """

    sequence: int
    micro_batch: int
    micro_batches: int
    others: tuple[int, ...] = ()


class Layer(NamedTuple):
    """One layer's work for one microbatch on one rank, the mean of dense and MoE layers.

    Args:
        attention, mlp: FLOPs of the forward.
        stream: bytes of one stream, C channels of all tokens.
        exchanged: bytes of one all-to-all; 0 for dense layers.
        tokens, width, inner: of the GEMM of a dense MLP, whose rate `probe` measures.
    """

    attention: float
    mlp: float
    stream: int
    exchanged: float
    tokens: int
    width: int
    inner: int


class Machine(NamedTuple):
    """What was measured, or is assumed: FLOP/s of a GEMM, GB/s of a message and of an all-to-all."""

    flops: float
    message: float
    all_to_all: float


def layer_of(config: Any, launch: Launch) -> Layer:
    """A TransformerConfig's layer."""
    width, tp = config.hidden_size, config.tensor_model_parallel_size
    tokens = launch.micro_batch * launch.sequence // config.context_parallel_size
    heads = config.kv_channels * config.num_attention_heads
    groups = config.kv_channels * (config.num_query_groups or config.num_attention_heads)
    # Projections of queries, keys, values and output; the scores are causal.
    attention = 2 * width * (2 * heads + 2 * groups) + 2 * launch.sequence * heads
    matrices = 3 if config.gated_linear_unit else 2
    inner = config.ffn_hidden_size
    share = _moe_share(config)
    experts = config.moe_router_topk * (config.moe_ffn_hidden_size or inner)
    experts += config.moe_shared_expert_intermediate_size or 0
    channels = (1 - share) * inner + share * experts
    element = (config.pipeline_dtype or config.params_dtype).itemsize
    local = tokens // tp if config.sequence_parallel else tokens
    ep = config.expert_model_parallel_size
    sent = share * config.moe_router_topk * (ep - 1) / ep
    return Layer(
        tokens * attention / tp,
        tokens * 2 * width * matrices * channels / tp,
        local * width * element,
        sent * tokens / tp * width * element,
        tokens,
        width,
        max(1, inner // tp),
    )


def _moe_share(config: Any) -> float:
    """The share of the layers that are MoE."""
    if not config.num_moe_experts:
        return 0.0
    moe = with_experts(config.moe_layer_freq, config.num_layers)
    return sum(moe) / len(moe)


def times_of(layer: Layer, streams: int, machine: Machine, slower: float = 1.0, full: bool = False) -> Times:
    """Milliseconds of a layer and of its messages.

    Args:
        streams: n.
        slower: all of compute takes so many times as long.
        full: whether a backward runs the layer's forward first, as full recompute does.
    """
    rate = OF_A_GEMM * machine.flops / 1e3 / slower
    attention, mlp = layer.attention / rate, layer.mlp / rate
    streams_pass = streams * layer.stream / STREAMS_PER_MS * slower
    exchange = layer.exchanged / (machine.all_to_all * 1e6)
    forward = attention + (2 * PASSES - POST_PASSES) * streams_pass
    return Times(
        attention=forward,
        mlp=mlp,
        post=POST_PASSES * streams_pass,
        attention_backward=2 * attention + 2 * BACKWARD_PASSES * streams_pass + full * forward,
        mlp_backward=2 * mlp + full * (mlp + POST_PASSES * streams_pass + 2 * exchange),
        replay=2 * PASSES * streams_pass,
        all_to_all=exchange,
        stream=layer.stream / (machine.message * 1e6),
        streams=streams,
    )
