"""A layer's forward in nodes between which other work runs, and its backward in the pieces between them.

attention   mHC pre, attention, post_res, the MLP's mHC pre, its norm; MoE: router, shared expert, permute
dispatch    all-to-all (MoE)          experts    the MLP or the local experts
combine     all-to-all (MoE)          post       unpermute, add the shared expert, dropout, post_res
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from megatron_mhc.layer import HyperConnectionTransformerLayer
from megatron_mhc.ops import packed
from megatron_mhc.pipeline.edges import backward, edge_of
from megatron_mhc.pipeline.layer_parts import cross, crossing, join, kept, read_by_post_res, route
from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.schedule.streams import stream_of
from megatron_mhc.sublayer import Call, Visit

Where = tuple[int, str]  # local layer and node
_HOW = "--mhc-pipeline-schedule fused"


class Tape:
    """Cuts one forward pass of a chunk into pieces, and runs their backward one by one.

    A cut replaces tensors by leaves of the same values. A piece's backward starts from the gradients that
    later pieces left in the leaves of the next cut.
    """

    def __init__(self, streams: HostStreams):
        self._streams = streams
        self._order: list[Where] = [(0, "attention")]
        self._cuts: dict[Where, list[tuple[GradientEdge | None, Tensor]]] = {}
        self._ends: list[GradientEdge | None] = []
        self._roots: list[tuple[GradientEdge | None, Tensor]] = []
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
                pairs.append((edge_of(tensor), leaf))
                leaves.append(leaf)
            else:
                leaves.append(tensor)
        self._order.append(where)
        self._cuts[where] = pairs
        return tuple(leaves)

    def end(self, *edges: GradientEdge | None) -> None:
        """What leaves the chunk at its end, whose gradient `seed` brings."""
        self._ends = list(edges)

    def early(self, *tensors: Tensor) -> None:
        """u and h_post, which left before the last MLP."""
        self._early = [edge_of(tensor) for tensor in tensors]

    def seed(self, gradients: list[Tensor]) -> None:
        self._roots += zip(self._ends, gradients, strict=True)

    def seed_early(self, du: Tensor) -> None:
        """du = dx: [s, b, n*C]; dh_post came with df."""
        assert self.dh_post is not None
        self._roots += zip(self._early, (du, self.dh_post), strict=True)

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
        for _, gradient in roots:
            self._streams.used(gradient)
        backward(roots)


class NodeByNode:
    """The forward of one micro-batch through a chunk's layers, node by node; a `chunk.Runner`.

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
        self, layer: HyperConnectionTransformerLayer, hidden_states: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        at, self._at = self._at, self._at + 1
        moe, cut = layer.is_moe_layer, self._split and at == self._layers - 1
        attention, mlp = layer.sublayers
        tape, u, h_post = self.tape, None, None

        with self.node(at, "attention", moe):
            streams, h_pre = layer.enter(hidden_states)
            if at:
                streams, h_pre = self._take((at, "attention"), streams, h_pre)
            visit = attention.pre(streams, h_pre)
            f = attention.run(layer, visit, call)
            # What is made ahead goes along the graph, which is cut between layers.
            streams = attention.post_res(visit, f, work_ahead=False)
            if cut:
                visit, wide, h_post = mlp.leave(streams, visit.handed_on)
                tape.early(wide, h_post)
                u, h_post = wide.detach(), h_post.detach()
            else:
                visit = mlp.pre(streams, visit.handed_on)
            shared = probs = None
            hidden = visit.layer_input
            if moe:
                hidden, probs, shared = route(layer, hidden, call.kwargs, _HOW)

        start = "dispatch" if moe else "experts"
        across = () if cut else crossing(visit)
        with self.node(at, "dispatch", moe, u):
            if moe:
                self._used(*kept(layer))
                hidden, probs, shared, *crossed = self._take((at, start), hidden, probs, shared, *across)
                hidden, probs = layer.mlp.dispatch(hidden, probs)
        with self.node(at, "experts", moe):
            if moe:
                self._used(*kept(layer))
                hidden, probs = self._take((at, "experts"), hidden, probs)
                hidden, _ = layer.mlp.routed_experts_compute(hidden, probs)
            else:
                hidden, *crossed = self._take((at, start), hidden, *across)
                visit.read_by_f(hidden)
                hidden = mlp.run(layer, visit, call)
        with self.node(at, "combine", moe):
            if moe:
                (hidden,) = self._take((at, "combine"), hidden)
                hidden = layer.mlp.combine(hidden)
            if h_post is not None:  # the next stage has the streams
                self._reads(layer, visit, h_post)
                f = (join(layer, hidden, shared, hidden) if moe else hidden).to(streams.dtype)
                tape.end(edge_of(f))
                return packed.pack(f, h_post), call.context
        with self.node(at, "post", moe):
            (hidden,) = self._take((at, "post"), hidden)
            self._reads(layer, visit, shared, *crossed)
            f = join(layer, hidden, shared, hidden) if moe else hidden
            cross(visit, crossed)
            streams = layer.leave(mlp.post_res(visit, f, work_ahead=False), visit.handed_on)
        self._streams.used(f)  # by the backward of the MLP's mHC pre, on the compute stream
        if self._last and self._at == self._layers:
            with self._streams.on("compute", self._event):
                self._streams.used(streams)
        return streams, call.context

    def _take(self, where: Where, *tensors: Tensor | None) -> tuple[Any, ...]:
        self._used(*tensors)
        return self.tape.cut(where, *tensors)

    def _used(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._streams.used(value)

    def _reads(self, layer: HyperConnectionTransformerLayer, visit: Visit, *tensors: Tensor | None) -> None:
        """The current stream reads tensors, the mappings' own, and what the dispatcher keeps."""
        self._used(*tensors, *read_by_post_res(visit), *(kept(layer) if layer.is_moe_layer else ()))
