"""A layer's nodes in Megatron's combined 1F1B (--overlap-moe-expert-parallel-comm), between streams.

Megatron runs them, the forward of one micro-batch in turns with the backward of another, and cuts the graph
between them.

    node           CUDA stream     MoE                                            dense
    pre_dispatch   compute         expand (first layer), pre, attention,          the same, up to the
                                   post_res, pre, norm, router, shared experts,   attention's post_res
                                   permute
    moe_dispatch   communication   all-to-all (Megatron's own)                    -
    mlp            compute         local experts (Megatron's own)                 pre, MLP, post_res, end
    moe_combine    communication   all-to-all, unpermute, add the shared          -
                                   experts, dropout, post_res, end

end: the model's last layer contracts the streams and applies the final norm.

post_res of a MoE layer stands where Megatron adds the residual: the other micro-batch's attention runs
beside it and beside the all-to-all in front of it. On the compute stream it would have that attention wait
for the all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.handed_on import taken
from megatron_mhc.layer import HyperConnectionTransformerLayer, viewless
from megatron_mhc.pipeline.layer_parts import cross, crossing, join, kept, read_by_post_res, route
from megatron_mhc.sublayer import Call, attention, mlp

_HOW = "--overlap-moe-expert-parallel-comm"
# Of the chunk's state, for the layer's attention: what Megatron's own node hands it.
_READ = (
    "attention_mask",
    "rotary_pos_emb",
    "rotary_pos_cos",
    "rotary_pos_sin",
    "packed_seq_params",
    "sequence_len_offset",
)


class _Discarded:
    """In the place of the norm's checkpoint, once Megatron's experts node has discarded its output."""

    def discard_output_and_register_recompute(self, _: Tensor) -> None:
        pass


class LayerNodes:
    """The forward functions of one layer's nodes, for one micro-batch.

    Args:
        stock: Megatron's for this layer, in the order of a plan's slots: [pre_dispatch, moe_dispatch, mlp,
            moe_combine, mtp_post_process].
    """

    def __init__(self, layer: HyperConnectionTransformerLayer, stock: Sequence[Callable[..., Any] | None]):
        self.layer, self._stock = layer, stock
        self._sublayers = {sublayer.f: sublayer for sublayer in layer.sublayers}

    def functions(self) -> list[Callable[..., Any] | None]:
        """In the order of `stock`."""
        _, dispatch, experts, combine, end = self._stock
        if self.layer.is_moe_layer:
            return [self.pre_dispatch_of_experts, dispatch, experts, self.moe_combine, end]
        return [self.pre_dispatch, dispatch, self.mlp, combine, end]

    def pre_dispatch(self, node: Any, hidden_states: Tensor) -> Tensor:
        """[s, b, n*C] streams behind the attention, of streams, or of [s, b, C] embeddings."""
        return self.layer.leave(*self._attention(node, hidden_states, work_ahead=False))

    def pre_dispatch_of_experts(self, node: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Permuted tokens and their probabilities; the rest crosses to `moe_combine`."""
        layer, chunk, state = self.layer, node.chunk_state, node.layer_state
        visit = self._sublayers[mlp].pre(*self._attention(node, hidden_states, work_ahead=True))
        reads = dict(packed_seq_params=chunk.packed_seq_params, padding_mask=chunk.padding_mask)
        tokens, probs, shared = route(layer, visit.layer_input, reads, _HOW)
        state.visit = visit
        state.leaves = [_leaf(node, tensor) for tensor in crossing(visit)]
        state.shared = None if shared is None else _leaf(node, shared)
        state.compute = torch.cuda.current_stream()
        return tokens, probs

    def mlp(self, node: Any, streams: Tensor) -> Tensor:
        """Of a dense layer: the streams behind it, or the final norm's output."""
        layer = self.layer
        streams, h_pre = taken(streams, layer.config, layer.mhc, "the node of an MLP")
        if mlp in self._sublayers:
            streams, h_pre = self._in_order(mlp, streams, h_pre, self._call(node), work_ahead=False)
        return self._end(node, layer.leave(streams, h_pre))

    def moe_combine(self, node: Any, output: Tensor) -> Tensor:
        """The streams behind a MoE layer, or the final norm's output."""
        layer, state, sublayer = self.layer, node.layer_state, self._sublayers[mlp]
        visit, leaves, shared = state.visit, state.leaves, state.shared
        state.visit = state.leaves = state.shared = None
        output = layer.mlp.combine(output)
        _used(shared, *leaves, *read_by_post_res(visit), *kept(layer))
        if layer.recompute_pre_mlp_layernorm:
            layer.pre_mlp_norm_checkpoint = _Discarded()
        f = join(layer, output, shared, visit.layer_input)
        cross(visit, leaves)
        streams = sublayer.post_res(visit, f, work_ahead=False)
        f.record_stream(state.compute)  # which reads it in the backward of the MLP's pre
        sublayer.let_go(visit)
        return self._end(node, layer.leave(streams, visit.handed_on))

    def _attention(self, node: Any, hidden_states: Tensor, work_ahead: bool) -> tuple[Tensor, Tensor | None]:
        _used(hidden_states)  # of the communication stream
        streams, h_pre = self.layer.enter(hidden_states)
        if attention not in self._sublayers:
            return streams, h_pre
        return self._in_order(attention, streams, h_pre, self._call(node), work_ahead)

    def _in_order(
        self, f: Callable[..., Tensor], streams: Tensor, h_pre: Tensor | None, call: Call, work_ahead: bool
    ) -> tuple[Tensor, Tensor | None]:
        sublayer = self._sublayers[f]
        visit = sublayer.pre(streams, h_pre)
        streams = sublayer.post_res(visit, sublayer.run(self.layer, visit, call), work_ahead)
        sublayer.let_go(visit)
        return streams, visit.handed_on

    def _call(self, node: Any) -> Call:
        return Call((), {name: getattr(node.chunk_state, name) for name in _READ})

    def _end(self, node: Any, streams: Tensor) -> Tensor:
        final_norm = node.chunk_state.model.decoder.final_layernorm
        ends = node.is_last_layer and not node.is_mtp and final_norm is not None
        return viewless(final_norm(streams) if ends else streams)


def _leaf(node: Any, tensor: Tensor) -> Tensor:
    """What a later node reads instead of `tensor`; Megatron's node asks for its gradient, if it has one."""
    return node.detach(tensor) if tensor.requires_grad else tensor


def _used(*values: Any) -> None:
    """The current CUDA stream reads these tensors, which another one may have allocated."""
    for value in values:
        if isinstance(value, Tensor):
            value.record_stream(torch.cuda.current_stream())
