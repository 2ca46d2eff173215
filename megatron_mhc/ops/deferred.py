"""The kernels under autograd, with the gradient of the streams applied once.

    streams --pre--> layer input --F--> f
       \\--- (tunnel) ---------------post_res--> streams'

x' depends on x twice: through H_res and, by way of the coefficients, through the projection. Autograd
would form both gradients and add them, n*C wide each. Instead `post_res` hands the gradient g of x' back
through the tunnel as it is, next to f, and the backward of `pre` turns it into dx in one pass. So what
the tunnel carries is not the gradient of x. It leaves `pre` only inside `DeferredMappings`, whose one
consumer is `post_res`; a second use raises.

Where streams' goes straight into the next connection's `pre`, the backward of that makes f's gradient too,
beside the gradient of streams' that f's is made of (`_written` is where the two are linked).

Where a pipeline stage ends between the two terms of x', `mix` stands in for `post_res`: g comes through the
tunnel as before, and dh_post in place of f.

Under torch.compile the ops of `library` stand in for all this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops import library, pre_kernels, split
from megatron_mhc.ops.boundary import can_project, post_res_project
from megatron_mhc.ops.link import Reader, Written
from megatron_mhc.ops.post_res import post_backward, post_res_forward


class DeferredMappings:
    """Coefficients of T tokens on their way from `pre` to `post_res`.

    h_pre, h_post: [T, n]; h_res: [T, n, n]; fp32, detached.
    """

    def __init__(self, tunnels: tuple[Tensor, ...], values: Tensor, rest: tuple[Any, ...], traced: bool):
        self.n = tunnels[0].shape[1]
        self.values = values
        self.rest = rest
        self.traced = traced  # made by `library.pre`; rest is then what its post_res takes, else _PostRes
        self._tunnels: tuple[Tensor, ...] | None = tunnels

    @property
    def h_pre(self) -> Tensor:
        return self.values[:, : self.n]

    @property
    def h_post(self) -> Tensor:
        return self.values[:, self.n : 2 * self.n]

    @property
    def h_res(self) -> Tensor:
        return self.values[:, 2 * self.n :].unflatten(1, (self.n, self.n))

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


class _Baton:
    """Carries f, and what post_res added to it, from the backward of post_res to that of pre."""

    f: Tensor | None = None
    f_bias: Tensor | None = None
    dh_post: Tensor | None = None  # of `mix`, which has no f


# Nodes of the autograd graph that hand a gradient on as it is: reshapes, and Megatron's make_viewless_tensor.
_PASSING = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "MakeViewlessTensorBackward")


def _written(x: Tensor) -> Written | None:
    """The `Written` of the post_res that made x, or None if something else did."""
    node = x.grad_fn
    while node is not None and node.name() in _PASSING:
        node = node.next_functions[0][0]
    return getattr(node, "written", None)


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor,
        baton: _Baton,
        upstream: Written | None,
        norm_eps: float,
        iterations: int,
        deepseek_v4: bool,
        hopper: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alphas = (alpha_pre, alpha_post, alpha_res)
        options: dict[str, Any] = dict(iterations=iterations, deepseek_v4=deepseek_v4)
        ahead = None if upstream is None else upstream.take_ahead(x, weight, bias, *alphas)
        if isinstance(ahead, tuple):  # all of it
            layer_input, saved, values = ahead
        else:
            pre_forward = pre_kernels(hopper and ahead is None)[0]
            parts = {} if ahead is None else {"parts": ahead}  # which Triton's alone takes
            layer_input, saved, values = pre_forward(
                x, weight, bias, alphas, norm_eps=norm_eps, **parts, **options
            )
        ctx.save_for_backward(x, weight, bias, *alphas, saved)
        ctx.baton, ctx.upstream, ctx.options, ctx.hopper = baton, upstream, options, hopper
        ctx.mark_non_differentiable(saved, values)
        ctx.set_materialize_grads(False)  # else autograd fills zeros for saved and values
        return layer_input, x.view_as(x), saved, values

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dl: Tensor | None, g: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, alpha_pre, alpha_post, alpha_res, saved = ctx.saved_tensors
        baton = ctx.baton
        f, f_bias, baton.f, baton.f_bias = baton.f, baton.f_bias, None, None
        dh_post, baton.dh_post = baton.dh_post, None
        dl = torch.zeros_like(x[:, 0]) if dl is None else dl  # the layer input reaches no loss
        if g is None or (f is None and dh_post is None):  # no post_res downstream, so f counts for nothing
            g, f, f_bias = torch.zeros_like(x), torch.zeros_like(dl), None
        pre_backward = pre_kernels(ctx.hopper and f is not None and f.dtype == x.dtype)[1]
        arrived = {} if dh_post is None else {"dh_post": dh_post}  # which Triton's alone takes
        dx, d_weight, d_bias, d_alphas = pre_backward(
            x,
            g.contiguous(),
            f,
            dl.contiguous(),
            weight,
            bias,
            (alpha_pre, alpha_post, alpha_res),
            saved,
            written=ctx.upstream,
            f_bias=f_bias,
            **arrived,
            **ctx.options,
        )
        return dx, d_weight, d_bias, d_alphas[:1], d_alphas[1:2], d_alphas[2:], *[None] * 6


class _PostRes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tunnel: Tensor,
        f: Tensor,
        values: Tensor,
        saved: Tensor,
        bias: Tensor,
        alpha_post: Tensor,
        baton: _Baton,
        linked: bool,
        reader: Reader | None,
        f_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(f, saved, bias, alpha_post, f_bias)
        ctx.baton, ctx.written = baton, Written(saved, bias, alpha_post) if linked else None
        made: Any
        if ctx.written is None or reader is None or f.dtype != tunnel.dtype or not can_project(tunnel):
            return post_res_forward(tunnel, f, values, f_bias)
        if reader.rest is None:
            out, made = post_res_project(tunnel, f, values, reader.weight, f_bias)
        else:
            from megatron_mhc.ops.hopper.pre import post_res_pre

            bias, alphas, options = reader.rest
            out, *made = post_res_pre(tunnel, f, values, f_bias, reader.weight, bias, alphas, **options)
            made = tuple(made)
        ctx.written.work_ahead(out, reader, made)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        f, saved, bias, alpha_post, f_bias = ctx.saved_tensors
        ctx.baton.f, ctx.baton.f_bias = f, f_bias
        g = g.contiguous()
        df = None if ctx.written is None else ctx.written.take(g)
        if df is None:
            df = post_backward(g, saved, bias, alpha_post)
        # g is not the gradient of the tunnel's streams: pre's backward makes it so.
        return g, df, *[None] * 7, df.sum(0) if ctx.needs_input_grad[9] else None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tunnel: Tensor, values: Tensor, baton: _Baton) -> tuple[Tensor, Tensor]:
        ctx.baton, n = baton, tunnel.shape[1]
        h_post = values[:, n : 2 * n].clone(memory_format=torch.contiguous_format)
        return split.mix(tunnel, values), h_post

    @staticmethod
    def backward(ctx: Any, g: Tensor, dh_post: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.baton.dh_post = dh_post.contiguous()
        return g, None, None  # as in `_PostRes`


def pre(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    *,
    norm_eps: float,
    iterations: int,
    deepseek_v4: bool,
    hopper: bool = False,
) -> tuple[Tensor, DeferredMappings]:
    """Read the layer input from the streams; see `pre.pre_forward` for shapes.

    Args:
        hopper: by the kernels of `hopper`, forward and backward, which are for n = 4 and bf16. A projection
            made ahead is left to Triton's, and so is the backward of an f that is not bf16.

    Returns:
        layer input [T, C] in x's dtype, and the mappings that `post_res` takes, once.
    """
    if torch.compiler.is_compiling():
        layer_input, *tunnels, saved, values = library.pre(
            x, weight, bias, *alphas, norm_eps, iterations, deepseek_v4, hopper
        )
        rest: tuple[Any, ...] = (x, saved, bias, alphas[1])  # whose gradients all leave `pre`
        return layer_input, DeferredMappings(tuple(tunnels), values, rest, traced=True)
    baton = _Baton()
    layer_input, tunnel, saved, values = _Pre.apply(
        x.contiguous(), weight, bias, *alphas, baton, _written(x), norm_eps, iterations, deepseek_v4, hopper
    )
    rest = (saved, bias.detach(), alphas[1].detach(), baton)
    return layer_input, DeferredMappings((tunnel,), values, rest, traced=False)


def post_res(
    f: Tensor,
    mappings: DeferredMappings,
    f_bias: Tensor | None = None,
    linked: bool = True,
    reader: Reader | None = None,
) -> Tensor:
    """Mix the streams that `mappings` came from and write f: [T, C] into them; returns [T, n, C].

    Args:
        f_bias: [C], which is added to f with the bits of an addition of its own.
        linked: let the next connection's backward make f's gradient; its graph then holds what pre saved.
        reader: the next connection, whose `pre` then need not read the streams, or once instead of twice.
    """
    if mappings.traced:
        x, *saved = mappings.rest
        f = f if f_bias is None else f + f_bias  # fused by the compiler
        return library.post_res(*mappings.take_tunnel(), x, f, mappings.values, *saved)
    if torch.compiler.is_compiling():  # but the graph broke in front of pre
        return _post_res_uncompiled(f, mappings, f_bias, linked, reader)
    (tunnel,) = mappings.take_tunnel()
    rest = (*mappings.rest, linked, reader, f_bias)
    return _PostRes.apply(tunnel, f.contiguous(), mappings.values, *rest)


def mix(mappings: DeferredMappings) -> tuple[Tensor, Tensor]:
    """u = H_res x: [T, n, C] and h_post: [T, n] fp32 of what an eager `pre` read.

    u's gradient is g, the gradient of x' = u + h_post^T f.

    Source: arXiv 2512.24880 Eq. (3).
    """
    (tunnel,) = mappings.take_tunnel()
    return _Mix.apply(tunnel, mappings.values, mappings.rest[-1])


_post_res_uncompiled = torch.compiler.disable(post_res)
