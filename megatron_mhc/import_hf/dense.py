"""A dense model's config.json as Megatron's arguments; what Megatron does not compute is refused by key."""

from __future__ import annotations

from typing import Any

from megatron_mhc.import_hf.values import Values

MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")
_OF_NO_PART = """
    _attn_implementation _name_or_path architectures attention_dropout auto_map aux_loss_alpha bos_token_id
    chunk_size_feed_forward eos_token_id ep_size id2label initializer_range
    is_encoder_decoder label2id max_window_layers model_type num_mtp_layers num_nextn_predict_layers
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type
    return_dict router_aux_loss_coef seq_aux transformers_version use_cache
""".split()


def architecture(values: Values) -> dict[str, Any]:
    """Megatron's arguments, by name, of a model of `MODELS`.

    Raises:
        ValueError: naming the key, its value and the remedy.
    """
    kind = values.take("model_type")
    if kind not in MODELS:
        raise ValueError(f"model_type is {kind!r:.80}: {', '.join(MODELS)} and exported models are imported")
    values.drop(*_OF_NO_PART)
    values.expect("quantization_config", None, default=None, why="quantised weights are not read")
    values.expect("hidden_act", "silu")
    heads = values.size("num_attention_heads")
    context = values.size("max_position_embeddings")
    out: dict[str, Any] = {
        "num_layers": values.size("num_hidden_layers"),
        "hidden_size": (width := values.size("hidden_size")),
        "ffn_hidden_size": values.size("intermediate_size"),
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "layernorm_epsilon": values.number("rms_norm_eps"),
        "untie_embeddings_and_output_weights": not values.switch("tie_word_embeddings"),
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
    }
    if kind == "deepseek_v3":
        if out["layernorm_epsilon"] != 1e-6:  # transformers' norms of the two ranks have it in any case
            raise ValueError(f"rms_norm_eps is {out['layernorm_epsilon']}: of {kind} only 1e-06 is imported")
        out |= _latent_attention(values, heads, context) | _sigmoid_experts(values, out["num_layers"])
    else:
        out |= _grouped_attention(values, kind, heads, width, context) | _windows(
            values, kind, out["num_layers"]
        )
    if kind == "qwen3_moe":
        out |= _softmax_experts(values, out["num_layers"])
    return out


def _rope(values: Values) -> tuple[str, Values]:
    """The type and its parameters, from both generations of keys."""
    rope = values.inside("rope_parameters")
    scaling = values.inside("rope_scaling")
    if rope is not None and scaling is not None:
        raise ValueError("rope_parameters and rope_scaling are both given: drop one of them")
    rope = rope or scaling or Values({}, "rope_parameters")
    for old in ("rope_theta", "partial_rotary_factor"):
        if (value := values.take(old, None)) is not None and rope.left.setdefault(old, value) != value:
            raise ValueError(
                f"{old} is {value!r:.80}, and another one in {rope.where[:-1]}: drop one of them"
            )
    kind = rope.take("rope_type", None)
    old_kind = rope.take("type", None)
    if None not in (kind, old_kind) and kind != old_kind:
        raise ValueError(
            f"{rope.where}type is {old_kind!r:.80} beside rope_type {kind!r:.80}: drop one of them"
        )
    kind, share = kind or old_kind or "default", rope.number("partial_rotary_factor", 1.0)
    if not isinstance(kind, str):
        raise ValueError(f"{rope.where}rope_type is {kind!r:.80}, not a name")
    if share != 1:  # transformers' rotate all channels whatever it says, or stop
        raise ValueError(f"{rope.where}partial_rotary_factor is {share}: these models rotate all channels")
    return kind, rope


def _trained_on(rope: Values, known: int, context: int) -> None:
    """Refuse another original context than Megatron's; transformers takes an absent one to be the whole."""
    key = "original_max_position_embeddings"
    rope.expect(key, known, default=context, why=f"it is {known} in Megatron")


def _base(rope: Values) -> int:
    base = rope.number("rope_theta", 10000)
    if base != int(base) or base < 1:
        raise ValueError(f"{rope.where}rope_theta is {base}: Megatron's --rotary-base is a whole number")
    return int(base)


def _grouped_attention(values: Values, kind: str, heads: int, width: int, context: int) -> dict[str, Any]:
    # Of a key that is absent the models' own defaults differ.
    groups = (
        values.size("num_key_value_heads", heads) if kind == "llama" else values.size("num_key_value_heads")
    )
    if heads % groups:
        raise ValueError(
            f"num_key_value_heads is {groups}, which does not divide num_attention_heads {heads}"
        )
    default = None if kind.startswith("qwen3") else width // heads
    out: dict[str, Any] = {
        "kv_channels": values.size("head_dim") if default is None else values.size("head_dim", default),
        "group_query_attention": True,
        "num_query_groups": groups,
    }
    name, rope = _rope(values)
    out["rotary_base"] = _base(rope)
    if name == "llama3":
        for key, known in (("low_freq_factor", 1), ("high_freq_factor", 4)):
            if (value := rope.number(key, known)) != known:
                raise ValueError(f"{rope.where}{key} is {value}: Megatron's --use-rope-scaling has {known}")
        _trained_on(rope, 8192, context)
        out |= {"use_rope_scaling": True, "rope_scaling_factor": rope.number("factor")}
    elif name == "linear":
        factor = rope.number("factor")
        if factor != int(factor) or factor < 1:
            raise ValueError(f"{rope.where}factor is {factor}: Megatron interpolates by whole numbers")
        out["rotary_seq_len_interpolation_factor"] = int(factor)
    elif name != "default":
        raise ValueError(
            f"{rope.where}rope_type is {name!r:.80}: Megatron has default, llama3 and linear here"
        )
    rope.drop("original_max_position_embeddings")
    rope.end()
    biased, mlp = values.switch("attention_bias"), values.switch("mlp_bias")
    if kind == "qwen2":
        values.expect("attention_bias", False)
        biased, out["add_qkv_bias"] = mlp, True
    if biased != mlp:
        raise ValueError(
            f"attention_bias is {biased} and mlp_bias {mlp}: Megatron has biases in all linear layers or none"
        )
    return out | {"add_bias_linear": biased, "qk_layernorm": kind.startswith("qwen3")}


def _windows(values: Values, kind: str, layers: int) -> dict[str, Any]:
    """Nothing, or a complaint: windows are not exported, nor checked against transformers."""
    why = "sliding windows are not imported"
    if kind.startswith("qwen"):
        values.expect("use_sliding_window", False, why=why)
        values.drop("sliding_window")
    else:
        if kind == "mistral" and "sliding_window" not in values.left:
            raise ValueError(f"sliding_window is absent, which means 4096: {why}; null is none")
        values.expect("sliding_window", None, default=None, why=why)
    types = values.take("layer_types", ["full_attention"] * layers)
    if types != ["full_attention"] * layers:
        raise ValueError(
            f"layer_types is {types!r:.80}: {why}, only full_attention in each of {layers} layers"
        )
    return {}


def _softmax_experts(values: Values, layers: int) -> dict[str, Any]:
    experts = values.size("num_local_experts", values.take("num_experts", None))
    only, step = values.take("mlp_only_layers", []), values.size("decoder_sparse_step", 1)
    if not isinstance(only, list) or not all(type(i) is int and 0 <= i < layers for i in only):
        raise ValueError(f"mlp_only_layers is {only!r:.80}, not numbers of layers below {layers}")
    frequency = [int(i not in only and (i + 1) % step == 0) for i in range(layers)]
    normalised = values.switch("norm_topk_prob")
    return {
        **_experts(values, frequency, experts, "num_local_experts"),
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalised,
    }


def _experts(values: Values, frequency: list[int], experts: int, named: str) -> dict[str, Any]:
    chosen = values.size("num_experts_per_tok")
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok is {chosen}, of {named} {experts}")
    if not any(frequency):
        raise ValueError("no layer has experts: give the model_type of the same model without them")
    return {
        "num_experts": experts,
        "moe_layer_freq": frequency,
        "moe_ffn_hidden_size": values.size("moe_intermediate_size"),
        "moe_router_topk": chosen,
    }


def _latent_attention(values: Values, heads: int, context: int) -> dict[str, Any]:
    values.expect("num_key_value_heads", heads, why="latent attention has a key for each head")
    values.expect("attention_bias", False, why="Megatron's latent attention has biases in all linear layers")
    values.expect("rope_interleave", True)
    rank = values.size("q_lora_rank")
    rotated = values.size("qk_rope_head_dim")
    nope = values.size("qk_nope_head_dim")
    for key, known in (("head_dim", rotated), ("qk_head_dim", nope + rotated)):
        values.expect(key, known)
    out: dict[str, Any] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "q_lora_rank": rank,
        "kv_lora_rank": values.size("kv_lora_rank"),
        "qk_head_dim": nope,
        "qk_pos_emb_head_dim": rotated,
        "v_head_dim": values.size("v_head_dim"),
    }
    name, rope = _rope(values)
    out["rotary_base"] = _base(rope)
    if name == "default":
        rope.drop("original_max_position_embeddings")
        out["rope_type"] = "rope"
    elif name == "yarn":
        _trained_on(rope, 4096, context)
        for key, known in (("beta_fast", 32), ("beta_slow", 1)):
            if (value := rope.number(key, known)) != known:
                raise ValueError(f"{rope.where}{key} is {value}: Megatron has {known}")
        rope.expect("truncate", True)
        rope.expect("attention_factor", None, default=None)
        both = [rope.number(key, 0) for key in ("mscale", "mscale_all_dim")]
        if both[1] and not both[0]:
            raise ValueError(f"{rope.where}mscale_all_dim is {both[1]} without mscale: Megatron needs both")
        out |= {"rope_type": "yarn", "rotary_scaling_factor": rope.number("factor")}
        out |= {"mscale": both[0] if all(both) else 1.0, "mscale_all_dim": both[1]}
    else:
        raise ValueError(f"{rope.where}rope_type is {name!r:.80}: Megatron has default and yarn here")
    rope.end()
    return out


def _sigmoid_experts(values: Values, layers: int) -> dict[str, Any]:
    experts = values.size("n_routed_experts", values.take("num_local_experts", None))
    values.expect("moe_layer_freq", 1)
    values.expect("scoring_func", "sigmoid")
    values.expect("topk_method", "noaux_tc")
    values.expect("norm_topk_prob", True)
    first = values.size("first_k_dense_replace", least=0)
    out = _experts(values, [int(i >= first) for i in range(layers)], experts, "n_routed_experts")
    if (chosen := out["moe_router_topk"]) == 1:
        raise ValueError(
            "num_experts_per_tok is 1: Megatron does not normalise the weight of a single expert"
        )
    shared = values.size("n_shared_experts") * out["moe_ffn_hidden_size"]
    groups, kept = values.size("n_group"), values.size("topk_group")
    if experts % groups or kept > groups or (groups > 1 and experts < 2 * groups):
        raise ValueError(f"n_group is {groups} and topk_group {kept}, of n_routed_experts {experts}")
    if groups > 1:
        if chosen % kept or chosen // kept != 2:
            raise ValueError(
                f"topk_group is {kept} with num_experts_per_tok {chosen}: a group is judged by its 2 best "
                "experts, Megatron's by as many as it gives to each kept group"
            )
        out |= {"moe_router_num_groups": groups, "moe_router_group_topk": kept}
    return out | {
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": values.number("routed_scaling_factor"),
    }
