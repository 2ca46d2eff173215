"""The transformer layer with mHC instead of its residual additions."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_mhc import parallel
from megatron_mhc.carried import remember
from megatron_mhc.chunk import ModelChunks
from megatron_mhc.config import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule, check_width
from megatron_mhc.sublayer import Call, SubLayer


class HyperConnectionTransformerLayer(TransformerLayer):
    """A TransformerLayer between n residual streams.

        streams -> pre -> attention -> post_res -> pre -> MLP/MoE -> post_res -> streams

    Attention and MLP are Megatron's own, run by its own `_forward_attention` and `_forward_mlp` with
    their norms, dropout and recompute, but without the addition of the residual (see
    `sublayer.bias_dropout`). The model's first layer copies the embedding into the streams.

    Args:
        chunks: shared by the layers of a model chunk; a layer without makes a chunk of its own.

    Raises:
        ValueError: a configuration that mHC does not support (see `parallel.validate`).

    Source: arXiv 2512.24880 Eq. (3).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        mhc: MHCConfig,
        chunks: ModelChunks | None = None,
        **kwargs: Any,
    ):
        parallel.validate(config, mhc)
        remember(config, mhc)
        super().__init__(config, submodules, layer_number, **kwargs)
        self.mhc = mhc
        first = 2 * (self.layer_number - 1)
        chunks = chunks or ModelChunks(config, mhc, layers=1)
        reserved = chunks.reserved_sms
        self.self_attention_hyper_connection = HyperConnectionModule(config, mhc, first, reserved)
        self.mlp_hyper_connection = HyperConnectionModule(config, mhc, first + 1, reserved)
        self.chunk = chunks.of(self)
        self.sublayers = self.chunk.add(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: [s, b, n*C] streams; [s, b, C] embeddings in the model's first layer.
            args, kwargs: as in TransformerLayer.forward.

        Returns:
            [s, b, n*C] streams and the cross-attention context, which is passed through.
        """
        return (self.chunk.runner or in_order).run(self, hidden_states, Call(args, kwargs))

    def enter(self, hidden_states: Tensor) -> Tensor:
        """Expand the embedding in the model's first layer; elsewhere check that streams came in."""
        width, n = self.config.hidden_size, self.mhc.num_residual_streams
        first = self.layer_number == 1
        check_width(hidden_states, width if first else n * width, f"layer {self.layer_number}")
        return self.self_attention_hyper_connection.backend.expand(hidden_states) if first else hidden_states


class InOrder:
    """Runs a layer's sub-layers one after the other; a `chunk.Runner`."""

    def run(
        self, layer: HyperConnectionTransformerLayer, hidden_states: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        streams = layer.enter(hidden_states)
        for sublayer in layer.sublayers:
            streams = self.sublayer(sublayer, layer, streams, call)
        return viewless(streams), call.context

    def sublayer(
        self, sublayer: SubLayer, layer: HyperConnectionTransformerLayer, streams: Tensor, call: Call
    ) -> Tensor:
        visit = sublayer.pre(streams)
        f = sublayer.run(layer, visit, call)
        return sublayer.post_res(visit, f)


in_order = InOrder()


def viewless(streams: Tensor) -> Tensor:
    """The streams as a tensor that is no view: pipeline schedules free it by its data, and refuse views."""
    if torch.compiler.is_compiling():
        # Megatron's exchanges storages by `.data`, which inductor compiles to a tensor of the wrong shape.
        return torch.ops.aten._unsafe_view(streams, streams.shape)
    return make_viewless_tensor(streams, requires_grad=streams.requires_grad, keep_graph=True)


def unsupported_submodule(submodules: TransformerLayerSubmodules) -> str | None:
    """Name the part of a layer that mHC cannot wrap, or None."""
    if submodules.cross_attention is not IdentityOp:
        return "cross_attention"
    if submodules.self_attention is IdentityOp:
        return "self_attention=IdentityOp"
    if submodules.mlp is IdentityOp:
        return "mlp=IdentityOp"
    return None
