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
from megatron_mhc.ops import reference
from megatron_mhc.pipeline.edges import backward, edge_of
from megatron_mhc.sublayer import Call, SubLayer


def packed_width(width: int, streams: int, dtype: torch.dtype) -> int:
    """Last dimension of a [f, h_post] or [df, dh_post] message: C, and n coefficients in their own dtype."""
    coefficients = reference.coefficient_dtype(torch.empty(0, dtype=dtype))
    return width + streams * coefficients.itemsize // dtype.itemsize


def pack(f: Tensor, h_post: Tensor) -> Tensor:
    """Join f: [s, b, C] and h_post: [s*b, n] of the coefficients' dtype, bit by bit, to [s, b, C + ...]."""
    s, b, _ = f.shape
    bits = h_post.detach().contiguous().view(f.dtype)
    return torch.cat([f.detach(), bits.view(s, b, bits.shape[-1])], dim=-1)


def unpack(message: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """f: [s*b, C] and h_post: [s*b, n] of a packed message."""
    flat = message.view(-1, message.shape[-1])
    f, bits = flat.split([width, flat.shape[-1] - width], dim=-1)
    return f, bits.contiguous().view(reference.coefficient_dtype(f))


def _places(message: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What `unpack` returns, in place: rows of the message; of an even width."""
    flat = message.view(-1, message.shape[-1])
    return flat[:, :width], flat[:, width:].view(reference.coefficient_dtype(flat))


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

    def sublayer(self, sublayer: SubLayer, layer: BetweenStreams, streams: Tensor, call: Call) -> Tensor:
        """As `InOrder`; of the last sub-layer it returns `pack(f, h_post)`."""
        if not sublayer.chunk.is_last(sublayer):
            return super().sublayer(sublayer, layer, streams, call)
        visit, u, h_post = sublayer.leave(streams)
        self._early(u.detach())
        layer_input = visit.layer_input
        if torch.is_grad_enabled():
            visit.layer_input = layer_input.detach().requires_grad_(layer_input.requires_grad)
        # The message's dtype, whatever autocast made of f.
        f = sublayer.run(layer, visit, call).to(streams.dtype)
        if torch.is_grad_enabled():
            self._f, self._leaf = edge_of(f), visit.layer_input
            self._rest = [edge_of(tensor) for tensor in (u, h_post, layer_input)]
        return pack(f, h_post)

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
        u: [s, b, n*C]; written: `pack(f, h_post)`; width: C.
        backend: of the stage's streams.
    """

    def __init__(self, u: Tensor, written: Tensor, width: int, backend: Backend):
        self._written, self._width = written, width
        self._kernels = backend.kernels(u, width) is not None
        f, h_post = self._arrived()
        x = u.view(f.shape[0], u.shape[-1] // width, width)
        if self._kernels:
            from megatron_mhc.ops.triton import stage_ends  # imports triton, which a CPU may lack

            self.streams = stage_ends.write(x, f, h_post).view(u.shape)
        else:
            self.streams = reference.write(x, f, h_post).view(u.shape)

    def gradients(self, dx: Tensor) -> Tensor:
        """`pack(df, dh_post)` that follow from dx: [s, b, n*C]."""
        f, h_post = self._arrived()
        g = dx.contiguous().view(*h_post.shape, self._width)
        if not self._kernels:
            df, dh_post = reference.write_backward(g, f, h_post)
            return pack(df.view(*dx.shape[:2], self._width), dh_post)
        from megatron_mhc.ops.triton import stage_ends

        message = torch.empty_like(self._written)
        stage_ends.write_backward(g, f, h_post, *_places(message, self._width))
        return message

    def _arrived(self) -> tuple[Tensor, Tensor]:
        """f: [s*b, C] and h_post: [s*b, n]."""
        return (_places if self._kernels else unpack)(self._written, self._width)
