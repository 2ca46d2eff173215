"""Megatron's arguments as the sizes of the exported model; what it has no form for is refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag

REMEDY = "the exported model has no such part; generate by Megatron instead (docs/inference.md)"
_NONE = (None, False)
_YARN = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}  # no flags: MLA's defaults
# What changes a forward pass and is not translated, with the values under which it does not. Parts that have
# weights need no row: `weights.py` refuses tensors that it does not know.
KNOWN: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": _NONE,
    "swiglu": (True,),
    "activation_func_clamp_value": _NONE,
    "glu_linear_offset": (0.0, None),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": _NONE,
    "no_rope_freq": _NONE,
    "mrope_section": _NONE,
    "softmax_scale": _NONE,  # of Megatron-Bridge's providers; no flag
    "softmax_type": ("vanilla",),
    "window_size": _NONE,
    "qk_l2_norm": _NONE,
    "attention_output_gate": _NONE,
    "experimental_attention_variant": _NONE,
    "linear_attention_freq": _NONE,
    "apply_residual_connection_post_layernorm": _NONE,
    "fp32_residual_connection": _NONE,
    "heterogeneous_layers_config_path": _NONE,
    "heterogeneous_layers_config_encoded_json": _NONE,
    "is_hybrid_model": _NONE,
    "hybrid_layer_pattern": _NONE,
    "use_mup": _NONE,
    "moe_apply_probs_on_input": _NONE,
    "moe_router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "moe_expert_capacity_factor": _NONE,
    "moe_expert_rank_capacity_factor": _NONE,
    "moe_input_jitter_eps": _NONE,
    "moe_latent_size": _NONE,
    "moe_mlp_glu_interleave_size": _NONE,
    "moe_shared_expert_glu_interleave_size": _NONE,
    "moe_router_force_load_balancing": _NONE,
    "moe_router_force_biased": _NONE,
}
# The arguments that give a model its sizes and its forward pass: `megatron` of config.json, by which
# megatron_mhc.import_hf makes the checkpoint of it again.
ARCHITECTURE = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention
    num_query_groups max_position_embeddings position_embedding_type rotary_base rotary_percent
    use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor normalization
    layernorm_epsilon swiglu add_bias_linear add_qkv_bias qk_layernorm untie_embeddings_and_output_weights
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
    rotary_scaling_factor mscale mscale_all_dim num_experts moe_layer_freq moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk moe_router_num_groups
    moe_router_group_topk moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor
    moe_router_enable_expert_bias moe_router_dtype
    """.split()
)
_ROUTERS = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")


def check(args: Any) -> None:
    """Refuse what the exported model does not compute.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    for name, known in KNOWN.items():
        if (value := getattr(args, name, known[0])) not in known:
            raise ValueError(f"--{name.replace('_', '-')} {value}: {REMEDY}")
    routers = getattr(args, "moe_router_load_balancing_type", "none")
    for router in routers if isinstance(routers, list) else [routers]:
        if router not in _ROUTERS:
            raise ValueError(f"--moe-router-load-balancing-type {router}: {REMEDY}")


def check_form(mhc: MHCConfig) -> None:
    """Refuse a form of mHC that the exported model does not compute, as `check` does."""
    if mhc.contract == "library":
        raise ValueError(f"{flag('contract')} library: {REMEDY}")


def rope(args: Any) -> dict[str, Any]:
    """Inverse frequencies, the magnitude of cos and sin, and the softmax's scale beside 1/sqrt(d)."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    latent, percent = args.multi_latent_attention, getattr(args, "rotary_percent", 1.0)
    if latent and (getattr(args, "rope_type", None) or "yarn") == "yarn":  # MLA's default
        if percent != 1.0:
            raise ValueError(f"--rotary-percent {percent} with --rope-type yarn: {REMEDY}")
        return _yarn(args)
    scaled = {}
    if not latent:
        scaled = {"rope_scaling": args.use_rope_scaling, "rope_scaling_factor": args.rope_scaling_factor}
    inverse = RotaryEmbedding(
        args.qk_pos_emb_head_dim if latent else head_size(args),
        percent,
        rotary_base=args.rotary_base,
        use_cpu_initialization=True,
        **scaled,
    ).inv_freq
    # Megatron divides positions, and MLA's own by nothing.
    factor = 1 if latent else getattr(args, "rotary_seq_len_interpolation_factor", None) or 1
    return {"inverse_frequencies": (inverse / factor).tolist(), "magnitude": 1.0, "softmax_scale": 1.0}


def _yarn(args: Any) -> dict[str, Any]:
    context, fast, slow = (getattr(args, name, value) for name, value in _YARN.items())
    dim, base, factor = args.qk_pos_emb_head_dim, args.rotary_base, args.rotary_scaling_factor

    def channel(turns: float) -> float:
        """The pair of channels that turns so often within the context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    def concentration(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    first, last = max(math.floor(channel(fast)), 0), min(math.ceil(channel(slow)), dim - 1)
    ramp = ((torch.arange(dim // 2).float() - first) / (last - first or 0.001)).clamp(0, 1)
    inverse = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    return {
        "inverse_frequencies": (inverse / factor * ramp + inverse * (1 - ramp)).tolist(),
        "magnitude": concentration(args.mscale) / concentration(args.mscale_all_dim),
        "softmax_scale": concentration(args.mscale_all_dim) ** 2,
    }


def head_size(args: Any) -> int:
    """Channels of a head without MLA."""
    return args.kv_channels or args.hidden_size // args.num_attention_heads


def mla(args: Any) -> dict[str, Any]:
    """Sizes of multi-latent attention, by Megatron's names."""
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    return {name: getattr(args, name) for name in names}


def moe(args: Any, state: dict[str, Tensor]) -> dict[str, Any] | None:
    """Sizes and router of the experts; None without."""
    prefixes = [f"model.layers.{i}.mlp." for i in range(args.num_layers)]
    layers = [prefix + "router.weight" in state for prefix in prefixes]
    if not any(layers):
        return None
    first = prefixes[layers.index(True)]
    shared = state.get(first + "shared.gate_proj.weight")
    experts, twice, _ = state[first + "gate_up_proj"].shape
    return {
        "layers": layers,
        "num_experts": experts,
        "intermediate_size": twice // 2,
        "shared_size": None if shared is None else shared.shape[0],
        "shared_gate": first + "shared_gate.weight" in state,
        "top_k": args.moe_router_topk,
        "num_groups": args.moe_router_num_groups,
        "group_top_k": args.moe_router_group_topk,
        "score_function": args.moe_router_score_function,
        "pre_softmax": args.moe_router_pre_softmax,
        "scaling_factor": args.moe_router_topk_scaling_factor,
        "expert_bias": first + "expert_bias" in state,
        "router_dtype": {"fp32": "float32", "fp64": "float64"}.get(args.moe_router_dtype),
    }


def config(args: Any, mhc: MHCConfig, state: dict[str, Tensor]) -> dict[str, Any]:
    """The sizes of the exported model.

    Args:
        args: of the run that trained it; `check` them first.
        state: of `weights.translate`; sizes and biases are those that its tensors have.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    first = "model.layers.0."
    vocabulary, width = state["model.embed_tokens.weight"].shape
    out: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": getattr(args, "layernorm_epsilon", None) or args.norm_epsilon,
        "linear_bias": first + "self_attn.o_proj.bias" in state,
        "tie_word_embeddings": "lm_head.weight" not in state,
        "rope": rope(args),
        "mla": mla(args) if args.multi_latent_attention else None,
        "moe": moe(args, state),
        "mhc": mhc.arithmetic(),
        "dtype": str(state["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "megatron": {
            name: value for name in ARCHITECTURE if (value := getattr(args, name, None)) is not None
        },
    }
    if args.multi_latent_attention:
        out["qk_norm"] = first + "self_attn.kv_a_layernorm.weight" in state
    else:
        out["head_dim"] = head = head_size(args)
        out["num_key_value_heads"] = state[first + "self_attn.k_proj.weight"].shape[0] // head
        out["qk_norm"] = first + "self_attn.q_norm.weight" in state
        out["qkv_bias"] = first + "self_attn.q_proj.bias" in state
    return out
