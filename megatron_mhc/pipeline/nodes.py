"""Where a model chunk ends and begins under the split boundary.

    x_out = H_res x' + H_post^T F(H_pre x'),   u = H_res x'

u and h_post follow from x', the streams in front of the chunk's last MLP. `StageExit` runs that last
sub-layer: it hands u out before the MLP and [f, h_post] after it, and goes backward through the MLP with
df alone. `StageEntry`, on the next stage, forms u + h_post^T f, and df and dh_post from dx.

Both use the reference operations, whatever --mhc-backend says: the Triton operations apply H_res^T to the
gradient in the backward of `pre`, together with what the split boundary keeps apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mhc.ops import reference

if TYPE_CHECKING:
    from megatron_mhc.layer import HyperConnectionTransformerLayer


def packed_width(width: int, streams: int, dtype: torch.dtype) -> int:
    """Last dimension of a [f, h_post] or [df, dh_post] message: C, and n coefficients in their own dtype."""
    coefficients = reference.coefficient_dtype(torch.empty(0, dtype=dtype))
    return width + streams * coefficients.itemsize // dtype.itemsize


def pack(f: Tensor, h_post: Tensor) -> Tensor:
    """Join f: [s, b, C] and h_post: [s*b, n] of the coefficients' dtype, bit by bit, to [s, b, C + ...]."""
    s, b, _ = f.shape
    bits = h_post.detach().contiguous().view(f.dtype).view(s, b, -1)
    return torch.cat([f.detach(), bits], dim=-1)


def unpack(message: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """f: [s*b, C] and h_post: [s*b, n] of a packed message."""
    flat = message.view(-1, message.shape[-1])
    f, bits = flat.split([width, flat.shape[-1] - width], dim=-1)
    return f, bits.contiguous().view(reference.coefficient_dtype(f))


def mix(streams: Tensor, h_res: Tensor) -> Tensor:
    """u = H_res x of streams: [s, b, n*C] and h_res: [s*b, n, n], in the streams' shape and dtype."""
    x = streams.view(h_res.shape[0], h_res.shape[-1], -1)
    return torch.einsum("tij,tjc->tic", h_res, x.to(h_res.dtype)).to(x.dtype).view(streams.shape)


class StageExit:
    """One forward and backward pass of one micro-batch through a chunk's last sub-layer.

    Args:
        early: called with u: [s, b, n*C], detached, before the MLP runs.
    """

    def __init__(self, early: Callable[[Tensor], None]):
        self._early = early
        # Edges, not tensors: what has been sent need not stay.
        self._f: GradientEdge | None = None
        self._leaf: Tensor | None = None  # what the MLP read, cut off from the rest of the chunk
        self._rest: list[GradientEdge | None] = []  # u, h_post, layer input; None for a constant

    def run(self, layer: HyperConnectionTransformerLayer, streams: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run the last MLP of a chunk on streams: [s, b, n*C]; returns `pack(f, h_post)`."""
        connection = layer.mlp_hyper_connection
        connection.plain = True
        try:
            layer_input, mappings = connection(streams)
        finally:
            connection.plain = False
        u = mix(streams, mappings.h_res)
        self._early(u.detach())
        leaf = layer_input
        if torch.is_grad_enabled():
            leaf = layer_input.detach().requires_grad_(layer_input.requires_grad)
        f = layer.forward_mlp(leaf, kwargs)
        if torch.is_grad_enabled():
            self._f, self._leaf = get_gradient_edge(f), leaf
            rest = (u, mappings.h_post, layer_input)
            self._rest = [get_gradient_edge(t) if t.requires_grad else None for t in rest]
        return pack(f, mappings.h_post)

    def backward_mlp(self, df: Tensor) -> None:
        """Go backward through the MLP with df: [s, b, C]."""
        edge, self._f = self._f, None
        assert edge is not None
        torch.autograd.backward([edge], [df])

    def backward_rest(self, du: Tensor, dh_post: Tensor) -> None:
        """Go backward through the rest of the chunk with du = dx: [s, b, n*C] and dh_post: [s*b, n]."""
        leaf, edges = self._leaf, self._rest
        self._leaf, self._rest = None, []
        assert leaf is not None
        gradients = (du, dh_post, leaf.grad)
        wanted = [(e, g) for e, g in zip(edges, gradients, strict=True) if e is not None and g is not None]
        torch.autograd.backward([e for e, _ in wanted], [g for _, g in wanted])


class StageEntry:
    """The streams that a chunk starts from: x = u + h_post^T f.

    Args:
        u: [s, b, n*C]; written: `pack(f, h_post)`.
    """

    def __init__(self, u: Tensor, written: Tensor, width: int):
        self._written, self._width = written, width
        f, h_post = unpack(written, width)
        streams = u.view(f.shape[0], -1, width)
        added = h_post.unsqueeze(-1) * f.to(h_post.dtype).unsqueeze(-2)
        self.streams = (streams.to(h_post.dtype) + added).to(u.dtype).view(u.shape)

    def gradients(self, dx: Tensor) -> Tensor:
        """`pack(df, dh_post)` that follow from dx: [s, b, n*C]."""
        f, h_post = unpack(self._written, self._width)
        wide = dx.view(f.shape[0], -1, self._width).to(h_post.dtype)
        df = torch.einsum("tn,tnc->tc", h_post, wide).to(f.dtype)
        dh_post = torch.einsum("tnc,tc->tn", wide, f.to(h_post.dtype))
        return pack(df.view(*dx.shape[:2], -1), dh_post)
