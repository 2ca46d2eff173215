"""A checkpoint's tensors by the names of the exported model.

`read` gives layers by number and experts stacked, whatever the format has; `translate` renames.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig
from megatron_mhc.convert import read_arithmetic
from megatron_mhc.convert.check import check_finite
from megatron_mhc.convert.read import (
    State,
    format_of,
    iteration_folder,
    load_torch,
    naming,
    rank_files,
    read_torch_dist,
)
from megatron_mhc.export import bridge_config
from megatron_mhc.export.settings import check, check_form, head_size

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12]\.weight)|(linear_fc[12]\.weight)(\d+))"
)
_NAMES = {  # of a layer; Transformer Engine keeps a norm with the linear layer behind it
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_q_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc2.bias": "mlp.down_proj.bias",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.expert_bias": "mlp.expert_bias",
    "mlp.experts.experts.linear_fc1.weight": "mlp.gate_up_proj",
    "mlp.experts.experts.linear_fc2.weight": "mlp.down_proj",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_gate.weight",
}
MODEL = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.norm.weight": "model.norm.weight",
    "decoder.final_layernorm.head.mapping_proj.weight": "model.hc_head.weight",
    "decoder.final_layernorm.head.bias": "model.hc_head.bias",
    "decoder.final_layernorm.head.alpha": "model.hc_head.alpha",
    **{
        f"decoder.final_layernorm.contraction.{part}.weight": f"model.hc_head.{part}.weight"
        for part in ("stream_norm", "read_down", "read_up")
    },
}
_CONNECTIONS = {"self_attention_hyper_connection": "attn_hc", "mlp_hyper_connection": "mlp_hc"}


def read(load: Path, trust: bool = False) -> tuple[State, Any, MHCConfig]:
    """A plugin checkpoint's tensors by Megatron's names, its arguments and its mHC options.

    Args:
        load: a checkpoint's folder, of torch_dist or torch.
        trust: run what its pickles hold.

    Raises:
        ValueError: naming the file or the flag, what is wrong with it and the remedy.
    """
    folder = iteration_folder(load)
    with naming(str(folder)):
        if format_of(folder) == "torch_dist":
            state, common = read_torch_dist(folder, trust)
            args = common.get("args") or bridge_config.arguments(folder)
        else:
            state, args = _read_torch(folder, trust)
        if getattr(args, "num_layers", None) is None:
            raise ValueError(
                "it has no arguments of a training run: save it by megatron.training or Megatron-Bridge"
            )
        check(args)  # in front of what a HybridModel has not
        mhc = read_arithmetic(state)
        check_form(mhc)
        tensors = {key: value for key, value in state.items() if "_extra_state" not in key}
        check_finite(tensors)
        return stack_experts(dict(_number_layers(tensors))), args, mhc


def _read_torch(folder: Path, trust: bool) -> tuple[State, Any]:
    state: State = {}
    files, _ = rank_files(folder, trust)
    for file, chunks in files:
        saved = load_torch(file, trust)
        args = saved["args"]
        for name in ("tensor_model_parallel_size", "expert_model_parallel_size"):
            if (size := getattr(args, name, 1)) > 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {size} with --ckpt-format torch: save as torch_dist")
        for chunk, first in chunks:
            for key, value in saved[chunk].items():
                if match := LAYER.fullmatch(key):
                    key = f"decoder.layers.{int(match[1]) + first}.{match[2]}"
                state[key] = value
    return state, args


def _number_layers(state: State) -> Iterator[tuple[str, Any]]:
    """torch_dist stacks layers that are all alike."""
    for key, value in state.items():
        prefix, found, rest = key.partition("decoder.layers.")
        if found and not prefix and not rest.split(".")[0].isdecimal():
            yield from ((f"decoder.layers.{i}.{rest}", part) for i, part in enumerate(value))
        else:
            yield key, value


def stack_experts(state: State) -> State:
    """The experts of a layer as one tensor, [experts, ...]; torch has each by itself."""
    experts: dict[str, dict[int, Tensor]] = {}
    for key in list(state):
        if (layer := LAYER.fullmatch(key)) and (match := EXPERT.fullmatch(layer[2])):
            whole = f"decoder.layers.{layer[1]}.mlp.experts.experts.{match[2] or match[3]}"
            experts.setdefault(whole, {})[int(match[1] or match[4])] = state.pop(key)
    return state | {key: torch.stack([parts[i] for i in sorted(parts)]) for key, parts in experts.items()}


def translate(state: State, args: Any) -> dict[str, Tensor]:
    """The tensors of `read` by the names of the exported model; layers of MTP are left out.

    Raises:
        ValueError: a tensor that the exported model has no place for.
    """
    out: dict[str, Tensor] = {}
    alphas: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("mtp."):
            continue
        if key in MODEL:
            out[MODEL[key]] = value
            continue
        match = LAYER.fullmatch(key)
        found = None if match is None else of_layer(match[2], value, args)
        if match is None or found is None:
            raise ValueError(f"{key}: the exported model has no such part; generate by Megatron instead")
        layer = f"model.layers.{match[1]}."
        for name, part in found.items():
            if ".alpha_" in name:
                whole, _, which = name.partition("_hc.alpha_")
                alphas.setdefault(f"{layer}{whole}_hc.alpha", {})[which] = part
            else:
                out[layer + name] = part
    for key, parts in alphas.items():
        out[key] = torch.cat([parts[which] for which in ("pre", "post", "res") if which in parts])
    if not args.untie_embeddings_and_output_weights:
        out.pop("lm_head.weight", None)
    return {key: value.contiguous() for key, value in out.items()}


def of_layer(name: str, value: Tensor, args: Any) -> dict[str, Tensor] | None:
    """One of Megatron's tensors, or what it is made of; None where it is not known."""
    module, _, part = name.rpartition(".")
    if module.split(".")[0] in _CONNECTIONS:
        part = name.partition(".")[2].removeprefix("mapping_proj.")
        return {f"{_CONNECTIONS[module.split('.')[0]]}.{part}": value}
    if args.multi_latent_attention and name == "self_attention.q_layernorm.weight":
        return {"self_attn.q_a_layernorm.weight": value}
    if name in _NAMES:
        return {_NAMES[name]: value}
    if part not in ("weight", "bias"):
        return None
    if module == "self_attention.linear_qkv":  # for each group: its queries, its key, its value
        head = head_size(args)
        groups = (value.shape[0] // head - args.num_attention_heads) // 2
        rows = value.unflatten(0, (groups, -1, head))
        parts = rows.split([rows.shape[1] - 2, 1, 1], dim=1)
        names = (f"self_attn.{letter}_proj.{part}" for letter in "qkv")
        return {key: rows.flatten(0, 2) for key, rows in zip(names, parts, strict=True)}
    if module in ("mlp.linear_fc1", "mlp.shared_experts.linear_fc1"):
        into = "mlp.shared." if "shared" in module else "mlp."
        gate, up = value.chunk(2)
        return {f"{into}gate_proj.{part}": gate, f"{into}up_proj.{part}": up}
    return None
