"""What a model's specs have in common: layers with mHC, and the chunks that they join."""

from __future__ import annotations

import dataclasses

from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from megatron_mhc.chunk import ModelChunk, ModelChunks
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.layer import (
    HyperConnectionMoELayer,
    HyperConnectionTransformerLayer,
    unsupported_submodule,
)
from megatron_mhc.mamba import HyperConnectionMambaLayer
from megatron_mhc.pipeline.links import sms_of_receives
from megatron_mhc.recompute.chunk import DroppingChunk
from megatron_mhc.sublayer import bias_dropout

LAYERS = {
    TransformerLayer: HyperConnectionTransformerLayer,
    MLPLayer: HyperConnectionTransformerLayer,
    MoETransformerLayer: HyperConnectionMoELayer,
    MambaLayer: HyperConnectionMambaLayer,
}


def wrap_layer_spec(spec: ModuleSpec, mhc: MHCConfig, chunks: ModelChunks | None = None) -> ModuleSpec:
    """Return a copy of a layer's spec with mHC instead of its residual additions.

    Args:
        spec: of a TransformerLayer, or of a layer of a HybridModel.
        mhc: mHC options.
        chunks: shared by the layers of a model chunk; `--mhc-recompute-layer-num` needs it, and
            `--mhc-boundary fused` then spans layers too.

    Raises:
        ValueError: a layer class or submodule that mHC cannot wrap, or recompute without `chunks`.
    """
    if mhc.recompute_layer_num != "off" and chunks is None:
        raise ValueError(
            f"{flag('recompute_layer_num')} {mhc.recompute_layer_num} needs to know all layers of a model "
            "chunk: wrap them by wrap_block_spec, not one by one by wrap_layer_spec"
        )
    if spec.module in LAYERS.values():
        return spec
    layer = LAYERS.get(spec.module)
    if layer is None:
        name = getattr(spec.module, "__name__", spec.module)
        raise ValueError(
            f"cannot wrap layers of {name}: mHC wraps megatron.core's TransformerLayer and MambaLayer"
        )
    if layer is HyperConnectionMambaLayer:
        without_residual = dict(mamba_bda=bias_dropout)
    else:
        if (part := unsupported_submodule(spec.submodules)) is not None:
            raise ValueError(f"cannot wrap a layer with {part}: mHC needs self-attention and an MLP, no more")
        without_residual = dict(self_attn_bda=bias_dropout, mlp_bda=bias_dropout)
    return ModuleSpec(
        module=layer,
        params={**spec.params, "mhc": mhc, "chunks": chunks},
        submodules=dataclasses.replace(spec.submodules, **without_residual),
        metainfo=spec.metainfo,
    )


def model_chunks(config: TransformerConfig, mhc: MHCConfig, layers: int, each: int = 2) -> ModelChunks:
    """What makes the chunks that these layers join; `each`: sub-layers of one."""
    kind = ModelChunk if mhc.recompute_layer_num == "off" else DroppingChunk
    return ModelChunks(config, mhc, layers, kind, sms_of_receives(config, mhc), each)
