"""A post_res and the next connection's `pre` as one node of the autograd graph (--mhc-boundary fused).

    tunnel, f --[ post_res, pre ]--> streams, layer input, tunnel

One launch makes all three, and one all gradients: what comes back through the tunnel and the layer input is
turned into dx, which is the g of the tunnel taken, and into df. The `pre` that is called next finds its
results on the streams. Of another connection, or called for other streams, it computes them by itself, and
gradients come by the streams alone.

The node keeps the streams that it makes, so who drops those has the two separate (`autograd`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.autograd import (
    Ahead,
    BackwardHandoff,
    KernelMappings,
    NextPre,
    Saved,
    gradients_of_f,
    gradients_of_pre,
)
from megatron_mhc.ops.triton.post_res import post_backward


class _Visit:
    """One pass: the mappings that post_res takes, the `pre` that reads, and the mappings that it makes."""

    def __init__(self, written: KernelMappings, read: NextPre):
        self.written, self.read, self.handoff = written, read, BackwardHandoff()
        self.values: tuple[Tensor, Tensor] | None = None  # saved and coefficients


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tunnel: Tensor,
        f: Tensor,
        f_bias: Tensor | None,
        weight: Tensor,
        affine: Tensor,
        visit: _Visit,
    ) -> tuple[Tensor, Tensor, Tensor]:
        written, read = visit.written, visit.read
        assert read.kernels.post_res_pre is not None
        streams, layer_input, saved, coefficients = read.kernels.post_res_pre(
            tunnel, f, written.coefficients, f_bias, weight, affine, read.options
        )
        visit.values = saved, coefficients
        # A view would keep the streams, which carry it: a cycle that no collector sees.
        x = streams.data.view(tunnel.shape)
        ctx.save_for_backward(f, f_bias, *written.saved, streams, weight, affine, saved)
        ctx.visit = written.handoff, read.kernels, read.options, visit.handoff
        ctx.shape = tunnel.shape
        ctx.set_materialize_grads(False)
        return streams, layer_input, x

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g_streams: Tensor | None, dl: Tensor | None, g: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        f, f_bias, *writer, streams, weight, affine, saved = ctx.saved_tensors
        x = streams.view(ctx.shape)
        written, kernels, options, handoff = ctx.visit
        written.f, written.f_bias = f, f_bias
        d_weight = d_affine = df = None
        if g is None and dl is None:
            if g_streams is None:
                return (None,) * 6
            dx = g_streams.reshape(x.shape).contiguous()
        else:
            dx, d_weight, d_affine, df = gradients_of_pre(
                kernels, options, handoff, x, weight, affine, saved, dl, g, tuple(writer)
            )
            if g_streams is not None:
                dx, df = dx + g_streams.reshape(x.shape), None
        df = post_backward(dx, *writer) if df is None else df
        return dx, *gradients_of_f(ctx, f, df), d_weight, d_affine, None


def can_join(mappings: KernelMappings, f: Tensor, next_pre: NextPre) -> bool:
    """Whether `post_res_pre` serves these; f: [..., C]."""
    if next_pre.kernels.post_res_pre is None or mappings.streams is not None or torch.compiler.is_compiling():
        return False
    return f.dtype in next_pre.kernels.dtypes


def post_res_pre(
    f: Tensor, mappings: KernelMappings, next_pre: NextPre, f_bias: Tensor | None = None
) -> Tensor:
    """`autograd.post_res` of f: [s, b, C], and ahead of its call the `pre` that reads what this returns.

    Returns:
        the streams [s, b, n*C], which carry what that `pre` returns, for `taken`.
    """
    (tunnel,) = mappings.take_tunnel()
    weight, affine = next_pre.weight, next_pre.affine
    visit = _Visit(mappings, next_pre)
    streams, layer_input, next_tunnel = _Boundary.apply(tunnel, f.contiguous(), f_bias, weight, affine, visit)
    assert visit.values is not None
    saved, coefficients = visit.values
    next_mappings = KernelMappings((next_tunnel,), coefficients, Saved(saved, affine), handoff=visit.handoff)
    streams.mhc_ahead = Ahead(streams, (weight, affine), (layer_input, next_mappings))
    return streams


def taken(streams: Tensor, weight: Tensor, affine: Tensor) -> tuple[Tensor, KernelMappings] | None:
    """Layer input [s, b, C] and mappings of the streams, if `post_res_pre` made them by these parameters."""
    ahead = getattr(streams, "mhc_ahead", None)
    if ahead is None:
        return None
    made = ahead.take(streams, weight, affine)
    # Who watches the gradient of the streams wants the whole, of which the node keeps a part to itself.
    return None if streams._backward_hooks or streams.retains_grad else made
