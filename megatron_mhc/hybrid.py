"""A HybridModel's stack of layers with mHC: attention, MLP, MoE and Mamba layers with one connection each."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc import hooks
from megatron_mhc.carried import StreamsModule
from megatron_mhc.config import MHCConfig
from megatron_mhc.contraction import Contraction
from megatron_mhc.hooks.uses import HYBRID_USES
from megatron_mhc.pipeline import auto
from megatron_mhc.preparation import prepare
from megatron_mhc.refusals import HYBRID, STACK, refuse
from megatron_mhc.streams import ContractNorm, check_contraction
from megatron_mhc.wrapping import model_chunks, wrap_layer_spec


class HyperConnectionHybridStack(StreamsModule, HybridStack):
    """A HybridStack between n residual streams.

        streams -> pre -> attention, MLP, MoE or mixer -> post_res -> streams

    The model's first layer copies the embedding into the streams, the final norm contracts them. Layers of
    multi-token prediction, which the model builds of the same submodules, stay plain: they read what is
    contracted.

    Args:
        submodules: Megatron's own; the stack takes mHC's layers in their place.
        contraction: see `wrap_hybrid_spec`.

    Raises:
        ValueError: an unsupported configuration, layer or Megatron version; no layer on the first stage.

    Source: arXiv 2512.24880 Eq. (3).
    """

    final_norm: nn.Module

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *args: Any,
        mhc: MHCConfig,
        layer_type_list: list[str],
        contraction: Contraction | None = None,
        **kwargs: Any,
    ):
        mhc = auto.resolved(config, mhc, launch=None)
        refuse(HYBRID, config, mhc)
        check_contraction(mhc, contraction)
        hooks.check_uses(HYBRID_USES)
        prepare(config, mhc)
        chunks = model_chunks(config, mhc, len(layer_type_list), each=1)
        layers = {
            name: wrap_layer_spec(spec, mhc, chunks)
            for name, spec in vars(submodules).items()
            if name.endswith("_layer") and isinstance(spec, ModuleSpec)
        }
        wrapped = dataclasses.replace(submodules, **layers)
        super().__init__(config, wrapped, *args, layer_type_list=layer_type_list, **kwargs)
        self.mhc = mhc
        refuse(STACK, self, mhc)
        if self.post_process and self.post_layer_norm:
            self.final_norm = ContractNorm(config, mhc, self.final_norm, contraction)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """HybridStack's forward, whose output is never its input: Megatron's schedules free what was sent."""
        hidden_states = super().forward(*args, **kwargs)
        passes_on = not self.layers and not (self.post_process and self.post_layer_norm)
        return hidden_states.clone() if passes_on else hidden_states


def wrap_hybrid_spec(spec: ModuleSpec, mhc: MHCConfig, contraction: Contraction | None = None) -> ModuleSpec:
    """Return a copy of a hybrid stack's spec with mHC instead of the residual additions of its layers.

    The configuration is checked, and the hooks that mHC needs are registered, when the model is built.

    Args:
        spec: of a HybridStack, as `megatron.core.models.hybrid.hybrid_layer_specs.hybrid_stack_spec`.
        mhc: mHC options.
        contraction: what builds the module that contracts the streams, under `--mhc-contract library`, see
            docs/contraction.md.

    Raises:
        ValueError: the spec of something else; a contraction beside another `--mhc-contract`.
    """
    if spec.module is not HybridStack:
        name = getattr(spec.module, "__name__", spec.module)
        raise ValueError(f"cannot wrap a stack of {name}: mHC wraps megatron.core's HybridStack")
    check_contraction(mhc, contraction)
    ours = {"mhc": mhc, "contraction": contraction}
    return dataclasses.replace(spec, module=HyperConnectionHybridStack, params={**spec.params, **ours})
