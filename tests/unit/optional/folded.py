"""What child.py tries of --mhc-norm folded: the arithmetic, the parameters and the checkpoints of `apart`."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trials
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.norm import fold
from megatron_mhc.specs import wrap_block_spec
from megatron_mhc.testing import gpt

OPTIONS = {name: MHCConfig(norm=name, init="uniform", init_gating_factor=0.5) for name in ("apart", "folded")}
KINDS = {
    "dense": dict(layernorm_zero_centered_gamma=True),
    "moe": dict(num_moe_experts=4, moe_router_dtype="fp64", moe_shared_expert_intermediate_size=16),
    "mla": dict(q_lora_rank=8, kv_lora_rank=8, qk_head_dim=4, qk_pos_emb_head_dim=4, v_head_dim=6),
}


def build(kind: str, norm: str, te: bool) -> Any:
    """A float64 model of one layer, whose parameters follow from their order."""
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    plain = dict(hidden_dropout=0.0, attention_dropout=0.0, add_bias_linear=False, bias_dropout_fusion=False)
    plain |= dict(masked_softmax_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False)
    sizes = dict(num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2)
    kinds = KINDS[kind] if te else {k: v for k, v in KINDS[kind].items() if "gamma" not in k}
    if kind == "mla":
        kinds = kinds | dict(rope_type="rope", apply_rope_fusion=False)
    make = MLATransformerConfig if kind == "mla" else TransformerConfig
    config = make(normalization="RMSNorm", params_dtype=torch.float64, **sizes, **plain, **kinds)
    if te:
        spec = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, False, False, kind == "mla")
    else:
        spec = get_gpt_layer_local_spec(config.num_moe_experts, normalization="RMSNorm")
    block = wrap_block_spec(spec, OPTIONS[norm], config)
    rope = dict(share_embeddings_and_output_weights=False, position_embedding_type="rope")
    model = GPTModel(config, block, trials.VOCABULARY, trials.SEQUENCE, **rope)
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def described(model: Any) -> dict[str, Any]:
    """Parameters in order, with what optimizers and reductions look at, and the entries of checkpoints."""
    marks = dict(sequence_parallel=False, allreduce=True, tensor_model_parallel=False)
    parameters = [
        [name, list(p.shape), str(p.dtype), *(getattr(p, mark, default) for mark, default in marks.items())]
        for name, p in model.named_parameters()
    ]
    sharded = model.sharded_state_dict(metadata=dict(dp_cp_group=trials.data_parallel()))
    return {"parameters": parameters, "state": list(model.state_dict()), "keys": trials.keys(sharded)}


def same(te: bool) -> dict[str, Any]:
    """Errors of loss and gradients against `apart`, by kind of model, and whether all else is the same."""
    found = {}
    gpt.keep_float64()
    for kind in KINDS if te else ("dense", "moe"):
        apart, folded = (build(kind, norm, te) for norm in OPTIONS)
        connections = [m for m in folded.modules() if isinstance(m, HyperConnectionModule)]
        losses = [trials.forward_backward(model, 0).item() for model in (apart, folded)]
        wanted = dict(apart.named_parameters())
        floor = 1e-3 * max(p.grad.abs().max() for p in wanted.values() if p.grad is not None)
        errors = [
            ((p.grad - wanted[name].grad).abs().max() / wanted[name].grad.abs().max().clamp(min=floor)).item()
            for name, p in folded.named_parameters()
            if p.grad is not None
        ]
        other = build(kind, "folded", te)
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(apart.state_dict())
        apart.load_state_dict(other.state_dict())
        found[kind] = {
            "folded": sum(connection.norm is not None for connection in connections),
            "error": max(abs(losses[0] - losses[1]), *errors),
            "described": described(apart) == described(folded),
            "exchanged": trials.forward_backward(other, 0).item() == losses[1],
        }
    return found


def refused() -> list[str | None]:
    """What is said of FP8, of a fused MLP and of a norm that is none of ours; then under `auto`."""
    config = copy.copy(build("dense", "folded", True).config)
    config.params_dtype = torch.float32
    quantized = copy.copy(config)
    quantized.fp8 = "hybrid"
    layer = get_gpt_layer_with_transformer_engine_spec().submodules
    fused = replace(layer, mlp=functools.partial(Other, submodules=layer.mlp.keywords["submodules"]))
    other = replace(layer, input_layernorm=Other)

    def said(norm: str, submodules: Any, config: Any) -> str | None:
        try:
            folded = fold(submodules, config, MHCConfig(norm=norm, backend="triton"))
            folded.input_layernorm(config=config, hidden_size=16, eps=1e-5)
            assert norm == "auto"
        except ValueError as error:
            return str(error)
        return None

    cases = ((layer, quantized), (fused, config), (other, config))
    return [said(norm, *case) for norm in ("folded", "auto") for case in cases]


class Other(torch.nn.Module):
    def __init__(self, **_: Any):
        super().__init__()


def checkpoints(te: bool, folder: Path) -> dict[str, Any]:
    """A third step, by the bits of one model, after two of the other and a checkpoint; and of a plain one."""
    options = dict(te=te, bf16=False, distributed=te, normalization="RMSNorm")  # see trials.runs
    found: dict[str, Any] = {}
    trainings = {norm: trials.Training(**options, mhc=mhc) for norm, mhc in OPTIONS.items()}
    for norm, training in trainings.items():
        training.step(0)
        (folder / norm).mkdir()
        dist_checkpointing.save(training.state(), str(folder / norm))
        found[norm] = training.step(1)
    for norm, other in (("apart", "folded"), ("folded", "apart")):
        trainings[norm].load(folder / other)
        found[f"{norm} of {other}"] = trainings[norm].step(1)
    plain = trials.Training(**options, mhc=None)
    plain.step(0)
    (folder / "plain").mkdir()
    dist_checkpointing.save(plain.state(), str(folder / "plain"))
    model = trials.build(MHCConfig(norm="folded", load_dense=True), "RMSNorm", te)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "plain"))
    model.load_state_dict(state["model"])
    mine = {name.replace("layernorm.norm.", "layernorm."): p for name, p in model.named_parameters()}
    found["plain"] = all(torch.equal(mine[name], p) for name, p in plain.bare.named_parameters())
    return found
