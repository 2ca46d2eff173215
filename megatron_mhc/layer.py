"""The transformer layer with mHC in place of its residual additions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.nn import functional as F

from megatron_mhc import ops, parallel
from megatron_mhc.carried import remember
from megatron_mhc.config import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule, check_width
from megatron_mhc.pipeline.layer_nodes import FusedPass
from megatron_mhc.pipeline.nodes import StageExit
from megatron_mhc.recompute.chunk import Chunks, check_recompute
from megatron_mhc.recompute.connection import ReplayedConnection

if TYPE_CHECKING:
    from megatron_mhc.hyper_connection import Mappings


def viewless(streams: Tensor) -> Tensor:
    """The streams as a tensor that is no view: pipeline schedules free it by its data, and refuse views."""
    if torch.compiler.is_compiling():
        # Megatron's exchanges storages by `.data`, which inductor compiles to a tensor of the wrong shape.
        return torch.ops.aten._unsafe_view(streams, streams.shape)
    return make_viewless_tensor(streams, requires_grad=streams.requires_grad, keep_graph=True)


class Row:
    """Tells every connection of a model chunk which one reads what it writes."""

    _last: HyperConnectionTransformerLayer | None = None

    def add(self, layer: HyperConnectionTransformerLayer) -> None:
        """Take in a layer that has just been built; a spec's layers are built in order."""
        last, self._last = self._last, layer
        # In a tuple, since a module in a module would be its part.
        if last is not None and last.layer_number + 1 == layer.layer_number:
            last.mlp_hyper_connection.following = (layer.self_attention_hyper_connection,)
        layer.self_attention_hyper_connection.following = (layer.mlp_hyper_connection,)


class HyperConnectionTransformerLayer(TransformerLayer):
    """A TransformerLayer between n residual streams.

        streams -> pre -> attention -> post_res -> pre -> MLP/MoE -> post_res -> streams

    Attention and MLP are Megatron's own, run by its own `_forward_attention` and `_forward_mlp` with
    their norms, dropout and recompute; only the addition of the residual is left out of them (see
    `bias_dropout`). The model's first layer copies the embedding into the streams.

    Raises:
        ValueError: a configuration that mHC does not support (see `parallel.validate`).

    Source: arXiv 2512.24880 Eq. (3).
    """

    # Set by a pipeline schedule for a forward pass:
    exit: StageExit | None = None  # it sends the last MLP's part by itself
    nodes: FusedPass | None = None  # it runs other work between the parts of the layer

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        mhc: MHCConfig,
        chunks: Chunks | None = None,
        row: Row | None = None,
        **kwargs: Any,
    ):
        parallel.validate(config, mhc)
        remember(config, mhc)
        check_recompute(mhc, chunks)
        super().__init__(config, submodules, layer_number, **kwargs)
        self.mhc = mhc
        first = 2 * (self.layer_number - 1)
        connection = HyperConnectionModule if chunks is None else ReplayedConnection
        self.self_attention_hyper_connection = connection(config, mhc, first)
        self.mlp_hyper_connection = connection(config, mhc, first + 1)
        self.self_attn_bda = partial(bias_dropout, connection=self.self_attention_hyper_connection)
        self.mlp_bda = partial(bias_dropout, connection=self.mlp_hyper_connection)
        if chunks is not None:
            chunks.add(self)
        (row or Row()).add(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: [s, b, n*C] streams; [s, b, C] embeddings in the model's first layer.
            args, kwargs: as in TransformerLayer.forward.

        Returns:
            [s, b, n*C] streams and the cross-attention context, which is passed through.
        """
        if self.nodes is not None:
            return self.nodes.run(self, hidden_states, args, kwargs)
        streams = self.enter(hidden_states)

        layer_input, mappings = self.self_attention_hyper_connection(streams)
        f, context = self.forward_attention(layer_input, mappings, args, kwargs)
        streams = self.self_attention_hyper_connection.post_res(streams, f, mappings)

        if self.exit is not None:
            return self.exit.run(self, streams, kwargs), context
        layer_input, mappings = self.mlp_hyper_connection(streams)
        f = self.forward_mlp(layer_input, kwargs, mappings)
        streams = self.mlp_hyper_connection.post_res(streams, f, mappings)

        return viewless(streams), context

    def forward_attention(
        self, layer_input: Tensor, mappings: Mappings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Run norm and attention on [s, b, C]; post_res with `mappings` may have the output's bias to add.

        Args:
            args, kwargs: those of `forward`.
        """
        connection = self.self_attention_hyper_connection
        connection.in_f = mappings
        f, context = self._forward_attention(layer_input, *args, **kwargs)
        connection.in_f = None
        return f, context

    def forward_mlp(
        self, layer_input: Tensor, kwargs: dict[str, Any], mappings: Mappings | None = None
    ) -> Tensor:
        """Run norm and MLP on [s, b, C] as `forward_attention` does; without mappings f is complete."""
        connection = self.mlp_hyper_connection
        connection.in_f = mappings
        f = self._forward_mlp(
            layer_input,
            kwargs.get("inference_context"),
            padding_mask=kwargs.get("padding_mask"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        connection.in_f = None
        return f

    def enter(self, hidden_states: Tensor) -> Tensor:
        """Expand the embedding in the model's first layer; elsewhere check that streams came in."""
        width, n = self.config.hidden_size, self.mhc.num_residual_streams
        first = self.layer_number == 1
        check_width(hidden_states, width if first else n * width, f"layer {self.layer_number}")
        return ops.expand(hidden_states, self.mhc) if first else hidden_states


def bias_dropout(
    training: bool, fused: bool, connection: HyperConnectionModule | None = None
) -> Callable[..., Tensor]:
    """Megatron's bias-dropout-add without the add: post_res adds the residual.

    Without dropout, post_res of `connection` adds the bias too, if it can.
    """

    def apply(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        output, bias = output_with_bias
        dropout = training and prob > 0
        if bias is not None and (dropout or connection is None or not connection.leave_bias(output, bias)):
            output = output + bias
        return F.dropout(output, p=prob, training=training)

    return apply


def unsupported_submodule(submodules: TransformerLayerSubmodules) -> str | None:
    """Name the part of a layer that mHC cannot wrap, or None."""
    if submodules.cross_attention is not IdentityOp:
        return "cross_attention"
    if submodules.self_attention is IdentityOp:
        return "self_attention=IdentityOp"
    if submodules.mlp is IdentityOp:
        return "mlp=IdentityOp"
    return None
