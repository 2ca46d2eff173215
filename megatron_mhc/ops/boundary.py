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
    BackwardHandoff,
    KernelMappings,
    gradients_of_f,
    gradients_of_pre,
)
from megatron_mhc.ops.link import Ahead, NextPre, Saved, handed_back, handed_to, made_by, run
from megatron_mhc.ops.options import ReadNorm
from megatron_mhc.ops.triton.post_res import post_backward


class _Visit:
    """One pass: the mappings that post_res takes, the `pre` that reads, and the mappings that it makes."""

    def __init__(self, written: KernelMappings, read: NextPre):
        self.written, self.read, self.handoff = written, read, BackwardHandoff()
        self.values: tuple[Tensor, Tensor, Tensor | None] | None = None  # saved, coefficients, norm_saved


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tunnel: Tensor,
        f: Tensor,
        f_bias: Tensor | None,
        weight: Tensor,
        affine: Tensor,
        norm_weight: Tensor | None,
        h_pre: Tensor | None,
        visit: _Visit,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        written, read, handed = visit.written, visit.read, handed_to(h_pre)
        assert read.kernels.post_res_pre is not None
        streams, layer_input, saved, coefficients, norm_saved = read.kernels.post_res_pre(
            tunnel, f, written.coefficients, f_bias, weight, affine, read.options,
            norm=read.norm, handed=handed,
        )  # fmt: skip
        visit.values = saved, coefficients, norm_saved
        # A view would keep the streams, which carry it: a cycle that no collector sees.
        x = streams.data.view(tunnel.shape)
        of_read = weight, affine, norm_weight, h_pre, saved, norm_saved
        ctx.save_for_backward(f, f_bias, *written.saved, streams, *of_read)
        ctx.visit = written.handoff, read, visit.handoff
        ctx.shape = tunnel.shape
        ctx.set_materialize_grads(False)
        return streams, layer_input, x, handed and handed.on

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, g_streams: Tensor | None, dl: Tensor | None, g: Tensor | None, d_on: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        f, f_bias, *writer, streams, weight, affine, norm_weight, h_pre, saved, norm_saved = ctx.saved_tensors
        x = streams.view(ctx.shape)
        written, read, handoff = ctx.visit
        norm = read.norm and read.norm._replace(weight=norm_weight)
        written.f, written.f_bias = f, f_bias
        d_weight = d_affine = df = d_norm_weight = handed = None
        if g is None and dl is None and d_on is None:
            if g_streams is None:
                return (None,) * 8
            dx = g_streams.reshape(x.shape).contiguous()
        else:
            of_read, trains = (weight, affine, norm, saved, norm_saved), ctx.needs_input_grad[3]
            handed = handed_back(h_pre, d_on)
            dx, d_weight, d_affine, df, d_norm_weight = gradients_of_pre(
                read.kernels, read.options, handoff, x, *of_read, dl, g, tuple(writer), trains, handed
            )
            if g_streams is not None:
                dx, df = dx + g_streams.reshape(x.shape), None
        df = post_backward(dx, writer[0], writer[1], read.options.form) if df is None else df
        d_h_pre = handed and handed.d_h_pre
        return dx, *gradients_of_f(ctx, f, df), d_weight, d_affine, d_norm_weight, d_h_pre, None


def can_join(mappings: KernelMappings, f: Tensor, next_pre: NextPre) -> bool:
    """Whether `post_res_pre` serves these; f: [..., C]."""
    if next_pre.kernels.post_res_pre is None or mappings.streams is not None or torch.compiler.is_compiling():
        return False
    return f.dtype in next_pre.kernels.dtypes and mappings.form == next_pre.options.form


def post_res_pre(
    f: Tensor, mappings: KernelMappings, next_pre: NextPre, f_bias: Tensor | None = None
) -> Tensor:
    """`autograd.post_res` of f: [s, b, C], and ahead of its call the `pre` that reads what this returns.

    `can_join` says where; so both connections are of one form.

    Returns:
        the streams [s, b, n*C], which carry what that `pre` returns, for `taken`.
    """
    (tunnel,) = mappings.take_tunnel()
    weight, affine, norm, h_pre = next_pre.weight, next_pre.affine, next_pre.norm, next_pre.h_pre
    visit = _Visit(mappings, next_pre)
    streams, layer_input, next_tunnel, handed_on = run(
        _Boundary, tunnel, f.contiguous(), f_bias, weight, affine, norm and norm.weight, h_pre, visit
    )
    assert visit.values is not None
    saved, coefficients, norm_saved = visit.values
    next_mappings = KernelMappings(
        (next_tunnel,),
        coefficients,
        Saved(saved, affine),
        next_pre.options.form,
        norm,
        norm_saved,
        handoff=visit.handoff,
        handed_on=handed_on,
    )
    streams.mhc_ahead = Ahead(streams, made_by(next_pre), (layer_input, next_mappings), norm)
    return streams


def taken(
    streams: Tensor, *parameters: Tensor, norm: ReadNorm | None = None
) -> tuple[Tensor, KernelMappings] | None:
    """What `autograd.pre` returns for the streams, if `post_res_pre` made it by these; see `Ahead.take`."""
    ahead = getattr(streams, "mhc_ahead", None)
    if ahead is None:
        return None
    made = ahead.take(streams, *parameters, norm=norm)
    # Who watches the gradient of the streams wants the whole, of which the node keeps a part to itself.
    return None if streams._backward_hooks or streams.retains_grad else made
