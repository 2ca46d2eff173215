"""A layer's forward in nodes between which other work runs, and its backward in the pieces between them.

attention   mHC pre, attention, post_res, the MLP's mHC pre, its norm; MoE: router, shared expert, permute
dispatch    all-to-all (MoE)          experts    the MLP or the local experts
combine     all-to-all (MoE)          post       unpermute, add the shared expert, dropout, post_res
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mhc.ops import reference
from megatron_mhc.pipeline.nodes import leave, pack
from megatron_mhc.pipeline.streams import HostStreams, stream_of

if TYPE_CHECKING:
    from megatron_mhc.layer import HyperConnectionTransformerLayer

Where = tuple[int, str]  # local layer and node


class Tape:
    """Cuts one forward pass of a chunk into pieces, and runs their backward one by one.

    A cut replaces tensors by leaves of the same values. A piece's backward starts from the gradients that
    later pieces left in the leaves of the next cut.
    """

    def __init__(self, streams: HostStreams):
        self._streams = streams
        self._order: list[Where] = [(0, "attention")]
        self._cuts: dict[Where, list[tuple[GradientEdge, Tensor]]] = {}
        self._ends: list[GradientEdge] = []
        self._roots: list[tuple[GradientEdge, Tensor]] = []
        self._early: list[GradientEdge | None] = []
        self._last: Any = None  # event of the piece whose backward ran last
        self.dh_post: Tensor | None = None

    def cut(self, where: Where, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Start the piece of `where`; returns leaves for the tensors that carry a gradient."""
        leaves: list[Tensor | None] = []
        pairs = []
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                leaf = tensor.detach().requires_grad_()
                pairs.append((get_gradient_edge(tensor), leaf))
                leaves.append(leaf)
            else:
                leaves.append(tensor)
        self._order.append(where)
        self._cuts[where] = pairs
        return tuple(leaves)

    def end(self, *edges: GradientEdge) -> None:
        """What leaves the chunk at its end, whose gradient `seed` brings."""
        self._ends = list(edges)

    def early(self, *tensors: Tensor) -> None:
        """u and h_post, which left before the last MLP."""
        self._early = [get_gradient_edge(t) if t.requires_grad else None for t in tensors]

    def seed(self, gradients: list[Tensor]) -> None:
        self._roots += list(zip(self._ends, gradients, strict=True))

    def seed_early(self, du: Tensor) -> None:
        """du = dx: [s, b, n*C]; dh_post came with df."""
        assert self.dh_post is not None
        for edge, gradient in zip(self._early, (du, self.dh_post), strict=True):
            if edge is not None:
                self._roots.append((edge, gradient))

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        """Around a piece's backward: on its stream, behind the piece before it."""
        with self._streams.on(stream, self._last) as event:
            yield
            self._last = event.record()

    def backward(self, where: Where) -> None:
        """Run the backward of the piece that starts at `where`; nothing for a node that the layer lacks."""
        if where not in self._order:
            return
        at = self._order.index(where)
        roots, self._roots = self._roots, []
        if at + 1 < len(self._order):
            for edge, leaf in self._cuts.pop(self._order[at + 1]):
                if leaf.grad is not None:
                    roots.append((edge, leaf.grad))
        self._order = self._order[: at + 1]
        if roots:
            for _, gradient in roots:
                self._streams.used(gradient)
            torch.autograd.backward([edge for edge, _ in roots], [gradient for _, gradient in roots])


class FusedPass:
    """The forward of one micro-batch through a chunk's layers.

    Args:
        reach: called with (local layer, node, u or None) before each node.
        layers: of the chunk.
        split: end with the split boundary.
        last: end with the model's loss, which the current stream computes.
    """

    def __init__(
        self,
        tape: Tape,
        reach: Callable[[int, str, Tensor | None], None],
        layers: int,
        *,
        split: bool,
        last: bool,
    ):
        self.tape, self._reach, self._layers, self._split, self._last = tape, reach, layers, split, last
        self._streams = tape._streams
        self._at = 0
        self._event: Any = None
        self.stream = "compute"  # of the last node

    @contextmanager
    def node(self, layer: int, name: str, moe: bool, mixed: Tensor | None = None) -> Iterator[None]:
        self._reach(layer, name, mixed)
        self.stream = stream_of(name, moe)
        with self._streams.on(self.stream, self._event) as event:
            yield
            self._event = event.record()

    def finish(self) -> None:
        """All nodes have run."""
        if self._at != self._layers:
            raise RuntimeError(f"{self._at} of {self._layers} layers ran")

    def run(
        self,
        layer: HyperConnectionTransformerLayer,
        hidden_states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and result are those of the layer's `forward`."""
        at, self._at = self._at, self._at + 1
        moe, cut = layer.is_moe_layer, self._split and at == self._layers - 1
        attention, writing = layer.self_attention_hyper_connection, layer.mlp_hyper_connection
        tape, u, h_post = self.tape, None, None

        with self.node(at, "attention", moe):
            if at:
                (hidden_states,) = self._take((at, "attention"), hidden_states)
            streams = layer.enter(hidden_states)
            layer_input, mappings = attention(streams)
            f, context = layer.forward_attention(layer_input, mappings, args, kwargs)
            streams = attention.post_res(streams, f, mappings)
            if cut:
                layer_input, mappings, wide, h_post = leave(writing, streams)
                tape.early(wide, h_post)
                u, h_post = wide.detach(), h_post.detach()
            else:
                layer_input, mappings = writing(streams)
            shared = probs = None
            if moe:
                norm, hidden, probs, shared = _route(layer, layer_input, kwargs)
                del norm
            else:
                hidden = layer_input

        start = "dispatch" if moe else "experts"
        crossing = () if cut else _crossing(streams, mappings)
        with self.node(at, "dispatch", moe, u):
            if moe:
                hidden, probs, shared, *crossed = self._take((at, start), hidden, probs, shared, *crossing)
                hidden, probs = layer.mlp.dispatch(hidden, probs)
        with self.node(at, "experts", moe):
            if moe:
                hidden, probs = self._take((at, "experts"), hidden, probs)
                hidden, _ = layer.mlp.routed_experts_compute(hidden, probs)
            else:
                hidden, *crossed = self._take((at, start), hidden, *crossing)
                hidden = layer.forward_mlp(hidden, kwargs, None if cut else mappings)
        with self.node(at, "combine", moe):
            if moe:
                (hidden,) = self._take((at, "combine"), hidden)
                hidden = layer.mlp.combine(hidden)
            if h_post is not None:  # the next stage has the streams
                self._reads(layer, mappings, h_post)
                f = (_join(layer, hidden, shared) if moe else hidden).to(streams.dtype)
                tape.end(get_gradient_edge(f))
                return pack(f, h_post), context
        with self.node(at, "post", moe):
            (hidden,) = self._take((at, "post"), hidden)
            self._reads(layer, mappings, shared, *crossed)
            f = _join(layer, hidden, shared) if moe else hidden
            streams, mappings = _crossed(streams, mappings, crossed)
            streams = writing.post_res(streams, f, mappings)
            streams = make_viewless_tensor(streams, requires_grad=streams.requires_grad, keep_graph=True)
        self._streams.used(f)  # by the backward of the MLP's mHC pre, on the compute stream
        if self._last and self._at == self._layers:
            with self._streams.on("compute", self._event):
                self._streams.used(streams)
        return streams, context

    def _take(self, where: Where, *tensors: Tensor | None) -> tuple[Any, ...]:
        for tensor in tensors:
            if tensor is not None:
                self._streams.used(tensor)
        return self.tape.cut(where, *tensors)

    def _reads(self, layer: HyperConnectionTransformerLayer, mappings: Any, *tensors: Tensor | None) -> None:
        """The current stream reads tensors, the mappings' own, and what the dispatcher keeps for itself."""
        if isinstance(mappings, reference.Coefficients):
            own: tuple[Any, ...] = tuple(mappings)
        else:
            own = (mappings.values, *mappings.rest)
        kept = vars(layer.mlp.token_dispatcher).values() if layer.is_moe_layer else ()
        for tensor in (*tensors, *own, *kept):
            if isinstance(tensor, Tensor):
                self._streams.used(tensor)


def _route(
    layer: HyperConnectionTransformerLayer, layer_input: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if getattr(kwargs.get("packed_seq_params"), "tokens_per_sample", None) is not None:
        raise ValueError(
            "--mhc-pipeline-schedule fused does not route packed samples one by one: use interleaved"
        )
    padding = kwargs.get("padding_mask")
    if padding is not None:
        padding = padding.transpose(0, 1).bool()  # as MoELayer.forward has it
    norm = layer._forward_pre_mlp_layernorm(layer_input)
    shared = layer.mlp.shared_experts_compute(norm)
    probs, routing = layer.mlp.route(norm, padding)
    hidden, probs = layer.mlp.preprocess(norm, probs, routing)
    return norm, hidden, probs, shared


def _join(layer: HyperConnectionTransformerLayer, combined: Tensor, shared: Tensor | None) -> Tensor:
    output = layer.mlp.postprocess(combined, shared)
    return layer._forward_post_mlp((output, None), output)


def _crossing(streams: Tensor, mappings: Any) -> tuple[Tensor, ...]:
    """What post_res reads of the attention's piece, the MLP aside."""
    if isinstance(mappings, reference.Coefficients):
        return streams, mappings.h_post, mappings.h_res
    return mappings.take_tunnel()  # whose gradients post_res hands through for pre


def _crossed(streams: Tensor, mappings: Any, leaves: list[Tensor]) -> tuple[Tensor, Any]:
    if isinstance(mappings, reference.Coefficients):
        return leaves[0], mappings._replace(h_post=leaves[1], h_res=leaves[2])
    mappings.put_back(tuple(leaves))
    return streams, mappings
