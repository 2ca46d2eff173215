"""What attention, MLP and mixers save for their backward pass, counted from a configuration.

Per token of the streams that a rank holds (sequence and context parallelism have divided them already),
for Megatron's TransformerEngine layers: fused norm-linear, flash attention, fused SwiGLU, no dropout. The
local layers save more. Of a mixer what its kernels cannot do without is counted alone. The input of a
sub-layer and the output of a norm that is a module of its own are not counted here: they are what a block
drops.

Used for two things: by `auto`, to which an estimate that is too low costs memory and never correctness,
and by `python -m megatron_mhc.recompute`.
"""

from __future__ import annotations

from typing import Any

from megatron_mhc.recompute.plan import SubLayerBytes


def sublayer(
    one: int,
    tokens: int,
    n: int,
    *,
    rows: int,
    norm: bool,
    inside: int,
    replayed: bool,
    coefficients: bool = False,
) -> SubLayerBytes:
    """Bytes of one sub-layer on one rank.

    Args:
        one: bytes of one stream of all tokens.
        tokens: of the streams that the rank holds.
        n: number of streams.
        rows: of the mappings that are learned.
        norm: a separate norm precedes F.
        inside: bytes per token, from `attention`, `mlp`, `mamba` or `delta`.
        replayed: the sub-layer is replayed, with the coefficients that `pre` gave, or with new
            ones if `coefficients`.
    """
    saved = rows + (rows > 0)  # of pre, for its backward: the normalised projection and 1/r, fp32
    kept = saved + rows * replayed if not (replayed and coefficients) else 0
    return SubLayerBytes(n * one, one * (1 + norm), one + 4 * tokens * kept, tokens * inside)


def _gathered(config: Any) -> int:
    """Tokens inside a tensor-parallel region for each token of the streams."""
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def _replays(config: Any, module: str) -> bool:
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or [])


def itemsize(config: Any) -> int:
    """Bytes of an activation's element."""
    return 2 if config.bf16 or config.fp16 else config.params_dtype.itemsize


def attention(config: Any, folded: bool = False, latent: bool | None = None) -> int:
    """Bytes per token that self-attention saves in addition to its input.

    Args:
        folded: the norm is computed by `pre`, see `norm`.
        latent: whether it is MLA; None as the configuration has it.
    """
    tp, tokens = config.tensor_model_parallel_size, _gathered(config)
    heads = config.num_attention_heads
    if config.multi_latent_attention if latent is None else latent:
        query = heads * (config.qk_head_dim + config.qk_pos_emb_head_dim)
        value = heads * config.v_head_dim
        latent = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_pos_emb_head_dim
        up = 2 * query + value  # q, k and v as attention takes them
        elements = tokens * latent + (0 if _replays(config, "mla_up_proj") else tokens * up / tp)
        out = value
    else:
        channels = config.kv_channels
        groups = config.num_query_groups or heads
        out = heads * channels
        # The rotated q and k, and the projection's output, of which v is a view.
        elements = tokens * (2 * (out + groups * channels) + groups * channels) / tp
        elements += 0 if folded else config.hidden_size  # the norm's output, inside the fused norm-linear
    elements += tokens * out / tp
    statistics = 4 * tokens * heads / tp  # fp32, of the softmax
    return round(itemsize(config) * elements + statistics)


def mlp(config: Any, moe: bool, folded: bool = False) -> int:
    """Bytes per token that an MLP, or a mixture of experts, saves beside its input; `folded` as above."""
    gate = 2 if config.gated_linear_unit else 1
    if not moe:
        if _replays(config, "mlp"):
            return 0
        inner = _gathered(config) * config.ffn_hidden_size * (gate + 1)
        inner /= config.tensor_model_parallel_size
        return round(itemsize(config) * (inner + (0 if folded else config.hidden_size)))
    if _replays(config, "moe"):
        return 0
    # Balanced experts: a rank computes as many tokens as it sends out.
    activation = 0 if _replays(config, "moe_act") else 1
    width = config.moe_ffn_hidden_size or config.ffn_hidden_size
    each = config.hidden_size + width * (gate + activation)
    shared = config.moe_shared_expert_intermediate_size or 0
    shared = 0 if _replays(config, "shared_experts") else shared
    shared = _gathered(config) * shared * (gate + 1) / config.tensor_model_parallel_size
    router = 3 * 4 * config.num_moe_experts  # logits, probabilities and their masked copy, fp32
    return round(itemsize(config) * (config.moe_router_topk * each + shared) + router)


def mamba(config: Any) -> int:
    """Bytes per token that a Mamba mixer saves beside its input: projection, scan and gated norm."""
    heads = config.mamba_num_heads
    inner = heads * config.mamba_head_dim if heads else 2 * config.hidden_size
    heads = heads or inner // config.mamba_head_dim
    projected = 2 * inner + 2 * config.mamba_num_groups * config.mamba_state_dim + heads
    return _mixer(config, projected + 2 * inner)


def delta(config: Any) -> int:
    """Bytes per token that a gated delta net saves beside its input: projection; q, k and v; its output."""
    heads, width = config.linear_num_value_heads, config.linear_key_head_dim
    keys, values = config.linear_num_key_heads * width, heads * config.linear_value_head_dim
    projected = 2 * keys + 2 * values + 2 * heads
    rule = 2 * heads * width + values
    return _mixer(config, projected + 2 * keys + rule + 2 * values)


def _mixer(config: Any, channels: int) -> int:
    """Of so many channels of the tokens inside a tensor-parallel region, and the norm in front."""
    inside = _gathered(config) * channels / config.tensor_model_parallel_size
    return round(itemsize(config) * (inside + config.hidden_size))
