"""The kernels under autograd, with the gradient of the streams applied once.

    streams --pre--> layer input --F--> f
       \\--- (tunnel) ---------------post_res--> next streams

The next streams depend on x, the streams, twice: through H_res and, by way of the coefficients, through the
projection. Autograd would form both gradients and add them, n*C wide each. Instead `post_res` hands the
gradient g of the next streams back through the tunnel as it is, next to f, and the backward of `pre` turns it
into dx in one pass. So what the tunnel carries is not the gradient of x. It leaves `pre` only inside
`KernelMappings`, whose one consumer is `post_res`; a second use raises.

Where the next streams go straight into the next connection's `pre`, a `Link` joins the two. The backward of
that `pre` computes df in the same launch as dx: df is made of dx alone, which is g here. Forward, post_res
may work ahead for that `pre`.

Where a pipeline stage ends between the two terms of the next streams, `mix` stands in for `post_res`: g comes
through the tunnel too, and dh_post instead of f.

Under --mhc-read previous the layer input is read with the h_pre of the connection in front, an input of
`pre`, which hands its own on as an output: two small tensors [T, n] with gradients of the usual kind.

Where the RMSNorm in front of F is folded into `pre` (`ReadNorm`), its output y stands for the layer input,
and dl for y's gradient.

Under torch.compile the ops of `compiled` stand in for all this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mhc.ops import compiled
from megatron_mhc.ops.kernels import TRITON, Kernels
from megatron_mhc.ops.link import (
    Ahead,
    Link,
    NextPre,
    Projected,
    Saved,
    handed_back,
    handed_to,
    link_of,
    made_by,
)
from megatron_mhc.ops.options import MIXES, READS, WRITES, Form, HandedBack, Options, ReadNorm
from megatron_mhc.ops.triton import stage_ends
from megatron_mhc.ops.triton.post_res import post_backward, post_res_forward
from megatron_mhc.ops.triton.post_res_project import can_project


class BackwardHandoff:
    """What the backward of a connection's post_res, or mix, leaves for the backward of its `pre`."""

    f: Tensor | None = None
    f_bias: Tensor | None = None  # that post_res added to f
    dh_post: Tensor | None = None  # of `mix`, which has no f

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        taken = self.f, self.f_bias, self.dh_post
        self.f = self.f_bias = self.dh_post = None
        return taken


class KernelMappings:
    """Coefficients of T tokens, computed by kernels, on their way from `pre` to `post_res`.

    h_pre, h_post: [T, n]; h_res: [T, n, n]; fp32, detached; constants where they are not learned.

    Args:
        coefficients: [T, M] fp32, h_pre, h_post and h_res row-major, those that are learned.
        form: of the coefficients.
        norm, norm_saved: folded into `pre`, and what that kept of it, [T, n+1] fp32; or None.
        handoff: from an eager `pre`.
        handed_on: [T, n] fp32, h_pre with its gradient, where the next connection reads with it.
        streams: [T, n, C], from a compiled one, whose tunnels are not the streams.
    """

    def __init__(
        self,
        tunnels: tuple[Tensor, ...],
        coefficients: Tensor,
        saved: Saved,
        form: Form,
        norm: ReadNorm | None = None,
        norm_saved: Tensor | None = None,
        *,
        handoff: BackwardHandoff | None = None,
        streams: Tensor | None = None,
        handed_on: Tensor | None = None,
    ):
        self.n = tunnels[0].shape[1]
        self.coefficients, self.saved, self.form = coefficients, saved, form
        self.norm, self.norm_saved = norm, norm_saved
        self.handoff, self.streams, self.handed_on = handoff, streams, handed_on
        self._tunnels: tuple[Tensor, ...] | None = tunnels

    @property
    def h_pre(self) -> Tensor:
        if self.form.parts & READS:
            return self.coefficients[:, : self.n]
        return self.coefficients.new_full((self.coefficients.shape[0], self.n), 1 / self.n)

    @property
    def h_post(self) -> Tensor:
        if self.form.parts & WRITES:
            first = self.n if self.form.parts & READS else 0
            return self.coefficients[:, first : first + self.n]
        return self.coefficients.new_ones(self.coefficients.shape[0], self.n)

    @property
    def h_res(self) -> Tensor:
        n = self.n
        if self.form.parts & MIXES:
            return self.coefficients[:, -n * n :].unflatten(1, (n, n))
        eye = torch.eye(n, dtype=torch.float32, device=self.coefficients.device)
        return eye.expand(self.coefficients.shape[0], n, n)

    def take_tunnel(self) -> tuple[Tensor, ...]:
        """What `post_res` takes and hands its gradient back through, once: first the streams, or their place.

        Raises:
            RuntimeError: on a second call, whose gradient the backward of `pre` would misread.
        """
        if self._tunnels is None:
            raise RuntimeError("post_res was called twice with the mappings of one pre: call pre again")
        tunnels, self._tunnels = self._tunnels, None
        return tunnels

    def put_back(self, tunnels: tuple[Tensor, ...]) -> None:
        """Undo `take_tunnel`, with tensors that stand for those taken."""
        self._tunnels = tunnels

    def read_by_post_res(self) -> tuple[Tensor, ...]:
        """The tensors that an eager post_res, or its backward, reads besides the tunnel and f."""
        return self.coefficients, *self.saved


class _Visit(NamedTuple):
    """One pass through `pre`: whose kernels, and what its forward and backward meet of others."""

    kernels: Kernels
    options: Options
    norm: ReadNorm | None
    upstream: Link | None  # from the post_res that made the streams
    handoff: BackwardHandoff
    shape: tuple[int, ...]  # of x in kernels: [T, n, C]
    read: tuple[int, ...]  # shape of the layer input: [T, C] or [s, b, C]


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        weight: Tensor,
        affine: Tensor,
        norm_weight: Tensor | None,
        h_pre: Tensor | None,
        visit: _Visit,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        kernels, options, norm, upstream, _, shape, read = visit
        ahead = None
        if upstream is not None and upstream.ahead is not None:
            of = (weight, affine) if h_pre is None else (weight, affine, h_pre)
            ahead = upstream.ahead.take(streams, *of, norm=norm)
        x, handed = streams.view(shape), handed_to(h_pre)
        if ahead is None:
            made = kernels.pre_forward(x, weight, affine, options, norm=norm, handed=handed)
        elif isinstance(ahead, Projected):
            kernels = kernels if kernels.takes_projection else TRITON
            more = dict(parts=ahead.parts, layer_input=ahead.layer_input, handed=handed)
            made = kernels.pre_forward(x, weight, affine, options, norm=norm, **more)
        else:
            made, handed = ahead
        layer_input, saved, coefficients, norm_saved = made
        layer_input = layer_input if layer_input.shape == read else layer_input.view(read)
        ctx.save_for_backward(x, weight, affine, norm_weight, h_pre, saved, norm_saved)
        ctx.visit, ctx.shape = visit, streams.shape
        ctx.mark_non_differentiable(*made[1 : 4 if norm else 3])
        ctx.set_materialize_grads(False)  # else autograd fills zeros for what is not differentiable
        return layer_input, x, saved, coefficients, norm_saved, handed and handed.on

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dl: Tensor | None, g: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, affine, norm_weight, h_pre, saved, norm_saved = ctx.saved_tensors
        kernels, options, norm, upstream, handoff, *_ = ctx.visit
        norm = norm and norm._replace(weight=norm_weight)
        writer = upstream.writer if upstream is not None and upstream.form == options.form else None
        handed = handed_back(h_pre, others[-1])
        dx, d_weight, d_affine, df, d_norm_weight = gradients_of_pre(
            kernels, options, handoff, x, weight, affine, norm, saved, norm_saved, dl, g, writer,
            ctx.needs_input_grad[1], handed,
        )  # fmt: skip
        dx = dx if dx.shape == ctx.shape else dx.view(ctx.shape)
        if df is not None:  # then there is a writer
            upstream.put_df(dx, df)
        return dx, d_weight, d_affine, d_norm_weight, handed and handed.d_h_pre, None


def gradients_of_pre(
    kernels: Kernels,
    options: Options,
    handoff: BackwardHandoff,
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    norm: ReadNorm | None,
    saved: Tensor,
    norm_saved: Tensor | None,
    dl: Tensor | None,
    g: Tensor | None,
    writer: tuple[Tensor, Tensor] | None,
    with_dphi: bool,
    handed: HandedBack | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """dx, d_weight, d_affine, df of the writer and d_norm_weight, of what has arrived of g, dl and f.

    Args:
        x, g: [T, n, C]; dl, and f of the handoff: [T, C], or [s, b, C] where kernels take that.
    """
    f, f_bias, dh_post = handoff.take()
    dl = x.new_zeros(x.shape[::2]) if dl is None else dl.contiguous()  # the layer input reaches no loss
    if g is None or (f is None and dh_post is None):  # no post_res downstream, so f counts for nothing
        g, f, f_bias = torch.zeros_like(x), torch.zeros_like(dl), None
    serving, more = kernels.backward_of(x, f), {} if dh_post is None else {"dh_post": dh_post}
    if serving is not kernels:
        f, dl = None if f is None else f.view(x.shape[::2]), dl.view(x.shape[::2])
    return serving.pre_backward(
        x, g.contiguous(), f, dl, weight, affine, saved, options,
        writer=writer, f_bias=f_bias, norm=norm, norm_saved=norm_saved, with_dphi=with_dphi, handed=handed,
        **more,
    )  # fmt: skip


class _PostRes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tunnel: Tensor,
        f: Tensor,
        f_bias: Tensor | None,
        mappings: KernelMappings,
        linked: bool,
        next_pre: NextPre | None,
    ) -> Tensor:
        coefficients, saved, form = mappings.coefficients, mappings.saved, mappings.form
        ctx.save_for_backward(f, *saved, f_bias)
        ctx.handoff, ctx.form, ctx.shape = mappings.handoff, form, tunnel.shape
        ctx.link = Link(saved, form) if linked else None
        # Those of one form, which has rows to project.
        projects = (
            next_pre is not None and next_pre.options.form == form and form.parts and can_project(tunnel)
        )
        if ctx.link is None or next_pre is None or f.dtype != tunnel.dtype or not projects:
            return post_res_forward(tunnel, f, coefficients, f_bias, parts=form.parts)
        kernels, weight, affine, options, norm, h_pre = next_pre
        if kernels.post_res_pre is not None:
            handed = handed_to(h_pre)
            out, *made = kernels.post_res_pre(
                tunnel, f, coefficients, f_bias, weight, affine, options, norm=norm, handed=handed
            )
            ctx.link.ahead = Ahead(out, made_by(next_pre), (tuple(made), handed), norm)
        else:
            assert kernels.post_res_project is not None
            folds, reads = norm is not None, norm is None and h_pre is not None
            out, parts, layer_input = kernels.post_res_project(
                tunnel, f, coefficients, weight, f_bias, folds, form.parts, reads
            )
            of = made_by(next_pre) if reads else (weight,)
            ctx.link.ahead = Ahead(out, of, Projected(parts, layer_input), norm)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        f, *saved, f_bias = ctx.saved_tensors
        ctx.handoff.f, ctx.handoff.f_bias = f, f_bias
        g = g.contiguous()
        df = None if ctx.link is None else ctx.link.take_df(g)
        # g is not the gradient of the tunnel's streams: pre's backward makes it so.
        g = g if g.shape == ctx.shape else g.view(ctx.shape)
        df = post_backward(g, saved[0], saved[1], ctx.form) if df is None else df
        return g, *gradients_of_f(ctx, f, df), None, None, None


def gradients_of_f(ctx: Any, f: Tensor, df: Tensor) -> tuple[Tensor, Tensor | None]:
    """df in the shape of f, and what its bias gets of it, the third input of a node."""
    df = df if df.shape == f.shape else df.view(f.shape)
    return df, df.view(-1, f.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tunnel: Tensor, mappings: KernelMappings) -> tuple[Tensor, Tensor]:
        ctx.handoff = mappings.handoff
        h_post = mappings.h_post.clone(memory_format=torch.contiguous_format)
        return stage_ends.mix(tunnel, mappings.coefficients, mappings.form.parts), h_post

    @staticmethod
    def backward(ctx: Any, g: Tensor, dh_post: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.handoff.dh_post = dh_post.contiguous()
        return g, None  # as in `_PostRes`


def pre(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    options: Options,
    kernels: Kernels = TRITON,
    n: int | None = None,
    norm: ReadNorm | None = None,
    h_pre: Tensor | None = None,
) -> tuple[Tensor, KernelMappings]:
    """Read the layer input from the streams; see `triton.pre.pre_forward` for shapes.

    Args:
        kernels: Triton's run what these cannot: a projection made ahead, an f of another dtype.
        n: of streams that come as x: [s, b, n*C].
        norm: what stands between the layer input and F, if `kernels` are to compute it (`folds_norm`).
        h_pre: [T, n] fp32, to read with, of the connection in front (`reads_previous`).

    Returns:
        layer input [T, C], or [s, b, C], in x's dtype, or the norm's output; and the mappings that `post_res`
        takes, once.
    """
    shape = x.shape if n is None else (x.shape[0] * x.shape[1], n, x.shape[2] // n)
    read = shape[::2] if n is None else (*x.shape[:2], shape[2])
    if torch.compiler.is_compiling():
        x = x.view(shape)
        layer_input, *tunnels, projection, coefficients, norm_saved, on = compiled.pre(
            x, weight, affine, *compiled.flat(options), kernels.name, *compiled.of_read(norm, h_pre)
        )
        saved = Saved(projection, affine)  # whose gradients, and that of x, all leave `pre`
        handed_on, of_norm = None if h_pre is None else on, (norm, norm and norm_saved)
        mappings = KernelMappings(
            tuple(tunnels), coefficients, saved, options.form, *of_norm, streams=x, handed_on=handed_on
        )
        return layer_input.view(read), mappings
    visit = _Visit(kernels, options, norm, link_of(x), BackwardHandoff(), shape, read)
    h_pre = None if h_pre is None else h_pre.contiguous()
    layer_input, tunnel, projection, coefficients, norm_saved, handed_on = _Pre.apply(
        x.contiguous(), weight, affine, norm and norm.weight, h_pre, visit
    )
    saved, rest = Saved(projection, affine), dict(handoff=visit.handoff, handed_on=handed_on)
    mappings = KernelMappings((tunnel,), coefficients, saved, options.form, norm, norm_saved, **rest)
    return layer_input, mappings


def post_res(
    f: Tensor,
    mappings: KernelMappings,
    f_bias: Tensor | None = None,
    linked: bool = True,
    next_pre: NextPre | None = None,
) -> Tensor:
    """Mix the streams that `mappings` came from and write f into them.

    Args:
        f: [T, C], and the result is [T, n, C]; or [s, b, C], and it is [s, b, n*C].
        f_bias: [C], which is added to f with the bits of an addition of its own.
        linked: let the next connection's backward make f's gradient; its graph then holds what pre saved.
        next_pre: reads the output; it then need not read the streams, or once instead of twice.
    """
    if mappings.streams is not None:  # of a compiled pre
        f = f if f_bias is None else f + f_bias  # fused by the compiler
        T, n, C = mappings.streams.shape
        mixed = compiled.post_res(
            *mappings.take_tunnel(),
            mappings.streams,
            f.reshape(T, C),
            mappings.coefficients,
            *mappings.saved,
            *mappings.form,
        )
        return mixed if f.dim() == 2 else mixed.view(*f.shape[:2], n * C)
    if torch.compiler.is_compiling():  # but the graph broke in front of pre
        return _post_res_uncompiled(f, mappings, f_bias, linked, next_pre)
    (tunnel,) = mappings.take_tunnel()
    return _PostRes.apply(tunnel, f.contiguous(), f_bias, mappings, linked, next_pre)


def mix(mappings: KernelMappings) -> tuple[Tensor, Tensor]:
    """u = H_res x: [T, n, C] and h_post: [T, n] fp32 of what an eager `pre` read.

    u's gradient is g, the gradient of x' = u + h_post^T f.

    Source: arXiv 2512.24880 Eq. (3).
    """
    (tunnel,) = mappings.take_tunnel()
    return _Mix.apply(tunnel, mappings)


_post_res_uncompiled = torch.compiler.disable(post_res)
