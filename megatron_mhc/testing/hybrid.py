"""A small HybridModel in any parallel layout, of Megatron's local modules; as `gpt`, whose steps it takes.

`use_local_stack` makes them those of Megatron's own stack spec, which else needs TransformerEngine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.specs import wrap_hybrid_spec
from megatron_mhc.testing.delta import LocalDeltaNet, use_torch


class Mixer(MegatronModule):
    """Stands in for MambaMixer, which needs its kernels: each token sees the mean of those before it."""

    def __init__(self, config: TransformerConfig, d_model: int, pg_collection: Any = None, **_: Any):
        super().__init__(config)
        settings = dict(config=config, init_method=config.init_method, skip_bias_add=True)
        settings |= dict(is_expert=False, bias=config.add_bias_linear, tp_group=pg_collection.tp)
        self.in_proj = ColumnParallelLinear(d_model, 2 * d_model, gather_output=False, **settings)
        self.out_proj = RowParallelLinear(2 * d_model, d_model, input_is_parallel=True, **settings)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        inner, _bias = self.in_proj(hidden_states)
        count = torch.arange(1, len(inner) + 1, device=inner.device, dtype=inner.dtype)
        return self.out_proj(torch.nn.functional.silu(inner.cumsum(0) / count[:, None, None]))


def local_submodules(norm: Callable[..., torch.nn.Module]) -> HybridStackSubmodules:
    """Megatron's local modules as layers of a stack; no DSA, which has none.

    Args:
        norm: builder of all norms.
    """

    def layer(kind: type, all_of_it: TransformerLayerSubmodules, *names: str) -> ModuleSpec:
        parts = {name: getattr(all_of_it, name) for name in (*names, "sharded_state_dict_keys_map")}
        return ModuleSpec(module=kind, submodules=TransformerLayerSubmodules(**parts))

    dense = get_gpt_layer_local_submodules()
    mla = get_gpt_layer_local_submodules(multi_latent_attention=True, qk_layernorm=True)
    moe = get_gpt_layer_local_submodules(num_experts=8)  # any number, says Megatron
    attention, mlp = (
        ("input_layernorm", "self_attention", "self_attn_bda"),
        ("pre_mlp_layernorm", "mlp", "mlp_bda"),
    )
    mamba = MambaLayerSubmodules(norm=norm, mixer=ModuleSpec(module=Mixer), mamba_bda=get_bias_dropout_add)
    delta = ModuleSpec(
        module=LocalDeltaNet,
        params={"norm": norm},
        submodules=GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    gdn = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=delta,
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )
    [depth] = hybrid_stack_spec.submodules.mtp_block_spec.submodules.layer_specs
    ends = dict.fromkeys(("enorm", "hnorm", "layer_norm"), norm)
    depth = dataclasses.replace(
        depth, submodules=dataclasses.replace(depth.submodules, eh_proj=ColumnParallelLinear, **ends)
    )
    block = hybrid_stack_spec.submodules.mtp_block_spec
    parts = dict(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=layer(TransformerLayer, dense, *attention),
        gdn_layer=ModuleSpec(module=TransformerLayer, submodules=gdn),
        mla_layer=layer(TransformerLayer, mla, *attention),
        mlp_layer=layer(MLPLayer, dense, *mlp),
        moe_layer=layer(MoETransformerLayer, moe, *mlp),
        mtp_block_spec=dataclasses.replace(
            block, submodules=dataclasses.replace(block.submodules, layer_specs=[depth])
        ),
    )
    has = {field.name for field in dataclasses.fields(HybridStackSubmodules)}
    return HybridStackSubmodules(**{name: part for name, part in parts.items() if name in has})


def use_local_stack(norm: Callable[..., torch.nn.Module]) -> None:
    """Have Megatron's own stack spec, wherever it was imported, and the final norm of its stacks be local."""
    vars(hybrid_stack_spec.submodules).update(vars(local_submodules(norm)))
    hybrid_block.TENorm = norm
    use_torch()


def model(pattern: str, sizes: Any) -> Callable[..., HybridModel]:
    """Builds a model's part of a stage, for `gpt.build`; `pattern` as --hybrid-layer-pattern."""

    def build(config: TransformerConfig, mhc: MHCConfig | None, **stage: Any) -> HybridModel:
        spec = hybrid_stack_spec if mhc is None else wrap_hybrid_spec(hybrid_stack_spec, mhc)
        return HybridModel(
            config,
            spec,
            sizes.vocabulary,
            sizes.sequence,
            hybrid_layer_pattern=pattern,
            position_embedding_type="rope",
            **stage,
        )

    return build
