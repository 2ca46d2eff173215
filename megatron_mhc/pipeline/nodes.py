"""Where a model chunk ends and begins under the split boundary.

    x_out = H_res x' + H_post^T F(H_pre x'),   u = H_res x'

u and h_post follow from x', the streams in front of the chunk's last MLP. `StageExit` runs that last
sub-layer: it hands u out before the MLP and [f, h_post] after it, and goes backward through the MLP with
df alone. `StageEntry`, on the next stage, forms u + h_post^T f, and df and dh_post from dx.

The kernels of `ops.split` do that wherever kernels serve the other connections, plain torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_mhc.config import MHCConfig
from megatron_mhc.ops import choose_backend, reference

if TYPE_CHECKING:
    from megatron_mhc.hyper_connection import HyperConnectionModule, Mappings
    from megatron_mhc.layer import HyperConnectionTransformerLayer


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


@torch.compiler.disable  # edges of its graph are taken, which a compiled one does not have
def leave(connection: HyperConnectionModule, streams: Tensor) -> tuple[Tensor, Mappings, Tensor, Tensor]:
    """Read the MLP's input and make what the next stage needs besides f.

    Args:
        connection: of the chunk's last MLP; streams: [s, b, n*C].

    Returns:
        layer input [s, b, C], the mappings, u [s, b, n*C] in the streams' dtype, and h_post [s*b, n].
    """
    connection.leaving = True
    try:
        layer_input, mappings = connection(streams)
    finally:
        connection.leaving = False
    if isinstance(mappings, reference.Coefficients):
        x = streams.view(*mappings.h_pre.shape, -1)
        u, h_post = reference.mix(x, mappings.h_res), mappings.h_post
    else:
        from megatron_mhc.ops import deferred  # imports triton, which a CPU may lack

        u, h_post = deferred.mix(mappings)
    return layer_input, mappings, u.view(streams.shape), h_post


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
        layer_input, _, u, h_post = leave(layer.mlp_hyper_connection, streams)
        self._early(u.detach())
        leaf = layer_input
        if torch.is_grad_enabled():
            leaf = layer_input.detach().requires_grad_(layer_input.requires_grad)
        f = layer.forward_mlp(leaf, kwargs).to(streams.dtype)  # the message's, whatever autocast made of f
        if torch.is_grad_enabled():
            self._f, self._leaf = get_gradient_edge(f), leaf
            rest = (u, h_post, layer_input)
            self._rest = [get_gradient_edge(t) if t.requires_grad else None for t in rest]
        return pack(f, h_post)

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
        u: [s, b, n*C]; written: `pack(f, h_post)`; width: C.
        mhc: options of the stage's connections; without them, kernels as under --mhc-backend auto.
    """

    def __init__(self, u: Tensor, written: Tensor, width: int, mhc: MHCConfig | None = None):
        self._written, self._width = written, width
        mhc = mhc or MHCConfig(num_residual_streams=u.shape[-1] // width)
        self._kernels = choose_backend(mhc, width, u.dtype, u.device.type) != "reference"
        f, h_post = self._arrived()
        x = u.view(f.shape[0], u.shape[-1] // width, width)
        if self._kernels:
            from megatron_mhc.ops import split  # imports triton, which a CPU may lack

            self.streams = split.write(x, f, h_post).view(u.shape)
        else:
            self.streams = reference.write(x, f, h_post).view(u.shape)

    def gradients(self, dx: Tensor) -> Tensor:
        """`pack(df, dh_post)` that follow from dx: [s, b, n*C]."""
        f, h_post = self._arrived()
        g = dx.contiguous().view(*h_post.shape, self._width)
        if not self._kernels:
            df, dh_post = reference.write_backward(g, f, h_post)
            return pack(df.view(*dx.shape[:2], self._width), dh_post)
        from megatron_mhc.ops import split

        message = torch.empty_like(self._written)
        split.write_backward(g, f, h_post, *_places(message, self._width))
        return message

    def _arrived(self) -> tuple[Tensor, Tensor]:
        """f: [s*b, C] and h_post: [s*b, n]."""
        return (_places if self._kernels else unpack)(self._written, self._width)
