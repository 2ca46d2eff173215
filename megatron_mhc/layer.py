"""Layers with mHC instead of their residual additions: transformer layers, and what all classes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.nn import functional as F

from megatron_mhc import norm, parallel
from megatron_mhc.backend import Backend
from megatron_mhc.carried import remember
from megatron_mhc.chunk import ModelChunk, ModelChunks
from megatron_mhc.config import MHCConfig
from megatron_mhc.gated import GatedConnection
from megatron_mhc.graphs import GraphEdge, Held
from megatron_mhc.handed_on import alone_width, first_weights, hand_on, taken
from megatron_mhc.hyper_connection import HyperConnectionModule, check_width
from megatron_mhc.layer_refusals import LAYER
from megatron_mhc.refusals import refuse
from megatron_mhc.schedule.plans import is_combined
from megatron_mhc.sublayer import Call, SubLayer, attention, mlp


class BetweenStreams(MegatronModule):
    """What layers of all classes have between n residual streams: their place in a chunk, and the way in."""

    layer_number: int
    mhc: MHCConfig
    chunk: ModelChunk
    sublayers: tuple[SubLayer, ...]
    held: Held  # by its CUDA graph
    is_mtp_layer = False  # of multi-token prediction: it reads streams, and its number counts depths

    @property
    def expands(self) -> bool:
        """Whether it is the model's first layer, which reads the embedding."""
        return self.layer_number == 1 and not self.is_mtp_layer

    def connection(self, f: str, at: int, chunks: ModelChunks) -> HyperConnectionModule | None:
        """A connection around the module f, the sub-layer `at` of this layer; None around an IdentityOp."""
        if isinstance(getattr(self, f), IdentityOp):
            return None
        before = self.layer_number - 1 + (self.config.num_layers if self.is_mtp_layer else 0)
        index = chunks.each * before + at % chunks.each
        folded = norm.folded_in(self, f)
        kind = GatedConnection if self.mhc.is_gated else HyperConnectionModule
        return kind(self.config, self.mhc, index, chunks.reserved_sms, folded)

    def parts(self) -> list[tuple[HyperConnectionModule, Callable[..., Tensor]]]:
        """Its connections with their F, in order."""
        raise NotImplementedError

    def connections(self) -> list[HyperConnectionModule]:
        return [connection for connection, _ in self.parts()]

    def join(self, chunks: ModelChunks, held: Held) -> None:
        """Take its place in a model chunk, once it has its connections."""
        self.expanding, self.held = Backend(self.mhc), held
        self.chunk = chunks.of(self)
        refuse(LAYER, self, self.mhc)
        self.sublayers = self.chunk.add(self)

    def run(
        self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Its forward, by the chunk's runner."""
        return (self.chunk.runner or in_order).run(self, hidden_states, Call(args, kwargs))

    def enter(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Expand the embedding in the model's first layer; elsewhere check that streams came in.

        Returns:
            streams [s, b, n*C], and the weights [s*b, n] that its first sub-layer reads with, None for its
            own.
        """
        where = f"MTP layer {self.layer_number}" if self.is_mtp_layer else f"layer {self.layer_number}"
        if not self.expands:
            return taken(hidden_states, self.config, self.mhc, where)
        check_width(hidden_states, self.config.hidden_size, where)
        streams = self.expanding.expand(hidden_states)
        first = first_weights(streams, self.mhc.num_residual_streams) if self.mhc.reads_previous else None
        return streams, first

    def leave(self, streams: Tensor, h_pre: Tensor | None) -> Tensor:
        """What the layer returns: streams: [s, b, n*C], and h_pre: [s*b, n], as its last sub-layer left them.

        Their tensor goes alone to another pipeline stage, and where Megatron runs each layer by itself: in a
        checkpoint, in a CUDA graph, as a unit of an FSDP, in nodes of its combined 1F1B, where it offloads.
        """
        if h_pre is None:
            return viewless(streams)
        config = self.config
        ends = self.chunk.last is self and config.pipeline_model_parallel_size > 1
        by_itself = config.recompute_granularity == "full" or any(self.held) or config.cpu_offloading
        by_itself |= is_combined(config, self.mhc)
        alone = ends or by_itself or parallel.is_gathered_alone(self)
        return hand_on(viewless(streams), h_pre, alone)


class HyperConnectionTransformerLayer(BetweenStreams, TransformerLayer, GraphEdge):
    """A TransformerLayer between n residual streams.

        streams -> pre -> attention -> post_res -> pre -> MLP/MoE -> post_res -> streams

    Attention and MLP are Megatron's own, run by its own `_forward_attention` and `_forward_mlp` with
    their norms, dropout and recompute, but without the addition of the residual (see
    `sublayer.bias_dropout`). The model's first layer copies the embedding into the streams. Where a layer
    has no attention or no MLP (`IdentityOp`), the streams pass unchanged.

    Args:
        chunks: shared by the layers of a model chunk; a layer without makes a chunk of its own.

    Raises:
        ValueError: a configuration that mHC does not support (see `parallel.validate`, `layer_refusals`,
            `norm.fold`).

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
        super().__init__(config, norm.fold(submodules, config, mhc), layer_number, **kwargs)
        self.mhc, self.eager = mhc, False
        chunks = chunks or ModelChunks(config, mhc, layers=1)
        self.self_attention_hyper_connection = self.connection("self_attention", 0, chunks)
        self.mlp_hyper_connection = self.connection("mlp", 1, chunks)
        self.join(chunks, Held.of(self))

    def parts(self) -> list[tuple[HyperConnectionModule, Callable[..., Tensor]]]:
        """Its attention's connection and its MLP's, as far as it has them."""
        both = (self.self_attention_hyper_connection, attention), (self.mlp_hyper_connection, mlp)
        return [(connection, f) for connection, f in both if connection is not None]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: [s, b, n*C] streams; [s, b, C] embeddings in the model's first layer.
            args, kwargs: as in TransformerLayer.forward.

        Returns:
            [s, b, n*C] streams and the cross-attention context, which is passed through.
        """
        return self.run(hidden_states, args, kwargs)

    # Of Megatron's CUDA graphs, see `graphs`.

    def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict[str, Tensor]:
        """Megatron's sample of what the graph reads, with streams [s, b, n*C] where it reads those."""
        inputs = super().get_layer_static_inputs(seq_length, micro_batch_size)
        sample = inputs["hidden_states"].to(parallel.streams_dtype(self.config))
        if not self.expands or not self.held.attention:
            sample = sample.repeat(1, 1, self.mhc.num_residual_streams)
            sample = F.pad(sample, (0, alone_width(self.config, self.mhc) - sample.shape[-1]))
        inputs["hidden_states"] = sample.detach().requires_grad_()
        return inputs

    def _get_submodules_under_cudagraphs(self) -> list[Any]:
        submodules = super()._get_submodules_under_cudagraphs()
        if self.config.cuda_graph_modules and self.held.attention:
            submodules.append(self.self_attention_hyper_connection)
        if self.config.cuda_graph_modules and (self.held.mlp or self.held.router):
            submodules.append(self.mlp_hyper_connection)
        return submodules

    def _should_call_local_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
        return not self.eager and super()._should_call_local_cudagraph(*args, **kwargs)

    def _should_call_te_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
        return not self.eager and super()._should_call_te_cudagraph(*args, **kwargs)

    def _te_cuda_graph_capture(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What the graph holds of the layer."""
        (attention, mlp), call = self.sublayers, Call(args, kwargs)
        if self.held.attention:
            streams, h_pre = in_order.sublayer(attention, self, *self.enter(hidden_states), call)
        else:
            streams, h_pre = taken(hidden_states, self.config, self.mhc, "the graph of an MLP")
        if self.held.mlp:
            streams, h_pre = in_order.sublayer(mlp, self, streams, h_pre, call)
        if not self.held.router:
            return (self.leave(streams, h_pre),)
        layer_input, crossing = mlp.connection.read_across(streams, h_pre)
        # Megatron ends what it returns here by the residual, whose gradient nobody asks for.
        *routed, residual = self._forward_mlp(layer_input)
        return *routed, residual.detach(), crossing

    def _te_cuda_graph_replay(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's forward: its graph, and what that does not hold of the layer."""
        (attention, mlp), call, inputs = self.sublayers, Call(args, kwargs), hidden_states
        if not self.held.attention:
            inputs = self.leave(*in_order.sublayer(attention, self, *self.enter(hidden_states), call))
            args, kwargs = (), {}
        if self.held.router:
            crossed: list[Tensor] = []
            f, _ = self._te_cuda_graph_replay_impl((inputs, *args), {**kwargs, "crossed": crossed}, None)
            visit = mlp.arrived(f, *crossed)
            return self.leave(mlp.post_res(visit, f), visit.handed_on), call.context
        (outputs,) = super(TransformerLayer, self)._te_cuda_graph_replay(inputs, *args, **kwargs)
        if not self.held.mlp:
            streams, h_pre = taken(outputs, self.config, self.mhc, "what follows the graph of an attention")
            outputs = self.leave(*in_order.sublayer(mlp, self, streams, h_pre, call))
        return outputs, call.context


class HyperConnectionMoELayer(HyperConnectionTransformerLayer, MoETransformerLayer):
    """A MoETransformerLayer between n residual streams.

    Its graphs of the router and of what follows the experts hold parts of F alone: they get no residual,
    which no one adds.
    """

    def transition_cudagraph_scope(self, mode: str) -> None:
        if mode == "partial" and not hasattr(self, "cudagraph_manager_router"):
            self.cudagraph_manager_router = CudaGraphManager(self.config, self, "_route")
            self.cudagraph_manager_postprocess = CudaGraphManager(self.config, self, "_postprocess")
        super().transition_cudagraph_scope(mode)

    def _route(self, layer_input: Tensor, padding_mask: Tensor | None = None) -> tuple[Any, ...]:
        return super()._forward_mlp_router(layer_input, padding_mask)[1:]

    def _forward_mlp_router(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Any:
        return hidden_states, *self._route(hidden_states, padding_mask=padding_mask)

    def _postprocess(
        self, output: Tensor, shared_expert_output: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return super()._forward_mlp_postprocess(output, output, shared_expert_output, bias)

    def _forward_mlp_postprocess(
        self, residual: Tensor, output: Tensor, shared_expert_output: Tensor | None, mlp_bias: Tensor | None
    ) -> Tensor:
        return self._postprocess(output, shared_expert_output, mlp_bias)


class InOrder:
    """Runs a layer's sub-layers one after the other; a `chunk.Runner`."""

    def run(self, layer: BetweenStreams, hidden_states: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        streams, h_pre = layer.enter(hidden_states)
        for sublayer in layer.sublayers:
            streams, h_pre = self.sublayer(sublayer, layer, streams, h_pre, call)
        if streams is hidden_states and layer.chunk.last is layer:
            streams = streams.clone()  # of no layer at all: Megatron's schedules free what a chunk sends
        return layer.leave(streams, h_pre), call.context

    def sublayer(
        self, sublayer: SubLayer, layer: BetweenStreams, streams: Tensor, h_pre: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """The streams behind a sub-layer, and what it has `handed_on`; h_pre: what was to it."""
        visit = sublayer.pre(streams, h_pre)
        f = sublayer.run(layer, visit, call)
        return sublayer.post_res(visit, f), visit.handed_on


in_order = InOrder()


def viewless(streams: Tensor) -> Tensor:
    """The streams as a tensor that is no view: pipeline schedules free it by its data, and refuse views."""
    if torch.compiler.is_compiling():
        # Megatron's exchanges storages by `.data`, which inductor compiles to a tensor of the wrong shape.
        return torch.ops.aten._unsafe_view(streams, streams.shape)
    return make_viewless_tensor(streams, requires_grad=streams.requires_grad, keep_graph=True)


def unsupported_submodule(submodules: TransformerLayerSubmodules) -> str | None:
    """Name the part of a layer that mHC cannot wrap, or None."""
    return None if submodules.cross_attention is IdentityOp else "cross_attention"
