"""Where a model chunk ends and begins under the split boundary.

    x_out = H_res x' + H_post^T F(H_pre x'),   u = H_res x'

u and h_post depend only on x', the streams in front of the chunk's last MLP. `StageExit` runs such a chunk:
it sends u before that MLP and [f, h_post] after it, and runs the MLP's backward with df alone. `StageEntry`,
on the next stage, forms u + h_post^T f, and df and dh_post from dx.

The kernels of `ops.triton.stage_ends` compute this where kernels serve the other connections, plain torch
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from megatron_mhc.backend import Backend
from megatron_mhc.layer import BetweenStreams, InOrder
from megatron_mhc.ops import packed, reference
from megatron_mhc.pipeline.edges import backward, edge_of
from megatron_mhc.sublayer import Call, SubLayer


class StageExit(InOrder):
    """One pass of one micro-batch through a chunk that ends in its last MLP; a `chunk.Runner`.

    Args:
        early: called with u: [s, b, n*C], detached, before that MLP runs.
    """

    def __init__(self, early: Callable[[Tensor], None]):
        self._early = early
        self._f: GradientEdge | None = None
        self._leaf: Tensor | None = None  # what the MLP read, cut off from the rest of the chunk
        self._rest: list[GradientEdge | None] = []  # u, h_post, layer input

    def sublayer(
        self, sublayer: SubLayer, layer: BetweenStreams, streams: Tensor, h_pre: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """As `InOrder`; of the last sub-layer it returns `pack(f, h_post)`, with all to hand on."""
        if not sublayer.chunk.is_last(sublayer):
            return super().sublayer(sublayer, layer, streams, h_pre, call)
        visit, u, h_post = sublayer.leave(streams, h_pre)
        self._early(u.detach())
        layer_input = visit.layer_input
        if torch.is_grad_enabled():
            visit.layer_input = layer_input.detach().requires_grad_(layer_input.requires_grad)
        # The message's dtype, whatever autocast made of f.
        f = sublayer.run(layer, visit, call).to(streams.dtype)
        if torch.is_grad_enabled():
            self._f, self._leaf = edge_of(f), visit.layer_input
            self._rest = [edge_of(tensor) for tensor in (u, h_post, layer_input)]
        return packed.pack(f, h_post), None

    def backward_mlp(self, df: Tensor) -> None:
        """Go backward through the MLP with df: [s, b, C]."""
        edge, self._f = self._f, None
        backward([(edge, df)])

    def backward_rest(self, du: Tensor, dh_post: Tensor) -> None:
        """Go backward through the rest of the chunk with du = dx: [s, b, n*C] and dh_post: [s*b, n]."""
        leaf, edges = self._leaf, self._rest
        self._leaf, self._rest = None, []
        assert leaf is not None
        backward(zip(edges, (du, dh_post, leaf.grad), strict=True))


class StageEntry:
    """The streams that a chunk starts from: x = u + h_post^T f.

    Args:
        u: [s, b, n*C]; written: `pack(f, h_post)`, behind h_post what is handed on; width: C.
        backend: of the stage's streams.

    Attributes:
        streams: [s, b, n*C], or where weights are handed on what `ops.packed` makes of both.
    """

    def __init__(self, u: Tensor, written: Tensor, width: int, backend: Backend):
        self._written, self._width, self._n = written, width, u.shape[-1] // width
        self._kernels = backend.kernels(u, width) is not None
        f, h_post, h_pre = self._arrived()
        x = u.view(f.shape[0], self._n, width)
        if self._kernels:
            from megatron_mhc.ops.triton import stage_ends  # imports triton, which a CPU may lack

            streams = stage_ends.write(x, f, h_post).view(u.shape)
        else:
            streams = reference.write(x, f, h_post).view(u.shape)
        self.streams = packed.pack(streams, h_pre) if h_pre.shape[1] else streams

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """dx: [s, b, n*C], and `pack(df, dh_post)`, of the gradient of `streams`."""
        f, h_post, h_pre = self._arrived()
        dx, dh_pre = gradient, None
        if h_pre.shape[1]:
            dx, dh_pre = packed.unpack(gradient.contiguous(), self._n * self._width)
        g = dx.reshape(-1, self._n, self._width).contiguous()
        dx = g.view(*gradient.shape[:2], self._n * self._width)
        if not self._kernels:
            df, dh_post = reference.write_backward(g, f, h_post)
            d_written = dh_post if dh_pre is None else torch.cat([dh_post, dh_pre], dim=1)
            return dx, packed.pack(df.view(*dx.shape[:2], self._width), d_written)
        from megatron_mhc.ops.triton import stage_ends

        message = torch.empty_like(self._written)
        df, d_written = packed.places(message, self._width)
        stage_ends.write_backward(g, f, h_post, df, d_written)
        if dh_pre is not None:
            d_written[:, self._n :] = dh_pre
        return dx, message

    def _arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """f: [s*b, C], h_post: [s*b, n], and what is handed on: [s*b, n], or [s*b, 0]."""
        f, written = (packed.places if self._kernels else packed.unpack)(self._written, self._width)
        return f, written[:, : self._n], written[:, self._n :]
