"""The operations of `autograd` as ops of `torch.library`, with their autograd: what torch.compile traces.

The scheme is that of `autograd`, with nothing but tensors between forward and backward. `pre` returns two
tensors that no one reads: the tunnels. `post_res` takes them, and its backward returns g as the "gradient"
of the first and f as that of the second, so autograd hands both to the backward of `pre`. Weights that are
handed on (--mhc-read previous) are an input and an output of the usual kind.

No link between connections: a compiled graph does not say which operation wrote x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake

from megatron_mhc.ops.kernels import BY_NAME
from megatron_mhc.ops.link import handed_back, handed_to
from megatron_mhc.ops.options import Form, Options, ReadNorm
from megatron_mhc.ops.triton.post_res import post_backward, post_res_forward

# Inductor may hand an op other strides than it traced; contiguous() of what is contiguous does nothing.


def flat(options: Options) -> tuple[float, int, bool, int, int, float, float]:
    """The options as arguments of an op."""
    return *options[:4], *options.form


def of_read(norm: ReadNorm | None, h_pre: Tensor | None) -> tuple[Any, ...]:
    """The last arguments of `pre`: the norm that it folds, and the weights that it reads with."""
    return *(norm or (None, 0.0, False)), h_pre


def _tunnels(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, n, C] and [T, C] of one element each.

    Not views of x: where the graph breaks between pre and post_res they are outputs of a graph, which
    AOTAutograd rebuilds from x, with a view's gradient, if they are its views.
    """
    T, n, C = x.shape
    return x.new_empty_strided((T, n, C), (0, 0, 0)), x.new_empty_strided((T, C), (0, 0))


@custom_op("megatron_mhc::pre", mutates_args=())
def pre(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    norm_eps: float,
    iterations: int,
    deepseek_v4: bool,
    reserved_sms: int,
    parts: int,
    post_magnitude: float,
    post_eps: float,
    backend: str,
    norm_weight: Tensor | None = None,
    read_norm_eps: float = 0.0,
    zero_centered: bool = False,
    h_pre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pre_forward`: layer input, tunnels of g [T, n, C] and f [T, C], saved, coefficients, norm_saved, `on`.

    Args:
        norm_weight, read_norm_eps, zero_centered: `ReadNorm`; without it, norm_saved is empty.
        h_pre: [T, n] fp32, to read with; without it, nothing is handed on: `on` is empty, else [T, n] fp32.
    """
    handed = handed_to(None if h_pre is None else h_pre.contiguous())
    layer_input, saved, coefficients, norm_saved = BY_NAME[backend].pre_forward(
        x.contiguous(),
        weight.contiguous(),
        affine,
        Options(norm_eps, iterations, deepseek_v4, reserved_sms, Form(parts, post_magnitude, post_eps)),
        norm=_norm(norm_weight, read_norm_eps, zero_centered),
        handed=handed,
    )
    norm_saved = _none(saved) if norm_saved is None else norm_saved
    on = _none(saved) if handed is None else handed.on
    return layer_input, *_tunnels(x), saved, coefficients, norm_saved, on


def _none(like: Tensor) -> Tensor:
    """For an op's output, which has to be a tensor."""
    return like.new_empty(0)


def _norm(weight: Tensor | None, eps: float, zero_centered: bool) -> ReadNorm | None:
    return None if weight is None else ReadNorm(weight.contiguous(), eps, zero_centered)


@custom_op("megatron_mhc::pre_backward", mutates_args=())
def _pre_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor,
    dl: Tensor,
    weight: Tensor,
    affine: Tensor,
    saved: Tensor,
    norm_saved: Tensor,
    norm_eps: float,
    iterations: int,
    deepseek_v4: bool,
    reserved_sms: int,
    parts: int,
    post_magnitude: float,
    post_eps: float,
    backend: str,
    norm_weight: Tensor | None = None,
    read_norm_eps: float = 0.0,
    zero_centered: bool = False,
    h_pre: Tensor | None = None,
    d_on: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norm = _norm(norm_weight, read_norm_eps, zero_centered)
    more = {} if norm is None else dict(norm=norm, norm_saved=norm_saved.contiguous())
    handed = handed_back(None if h_pre is None else h_pre.contiguous(), d_on)
    dx, d_weight, d_affine, _, d_norm_weight = (
        BY_NAME[backend]
        .backward_of(x, f)
        .pre_backward(
            x.contiguous(),
            g.contiguous(),
            f.contiguous(),
            dl.contiguous(),
            weight.contiguous(),
            affine,
            saved.contiguous(),
            Options(norm_eps, iterations, deepseek_v4, reserved_sms, Form(parts, post_magnitude, post_eps)),
            handed=handed,
            **more,
        )
    )
    assert d_weight is not None
    d_norm_weight = _none(saved) if d_norm_weight is None else d_norm_weight
    return dx, d_weight, d_affine, d_norm_weight, _none(saved) if handed is None else handed.d_h_pre


@custom_op("megatron_mhc::post_res", mutates_args=())
def post_res(
    g_tunnel: Tensor,
    f_tunnel: Tensor,
    x: Tensor,
    f: Tensor,
    coefficients: Tensor,
    saved: Tensor,
    affine: Tensor,
    parts: int,
    post_magnitude: float,
    post_eps: float,
) -> Tensor:
    """`post_res_forward`, given what `pre` returned; `pre` alone gives x a gradient."""
    return post_res_forward(x.contiguous(), f.contiguous(), coefficients.contiguous(), parts=parts)


@custom_op("megatron_mhc::post_res_backward", mutates_args=())
def _post_backward(
    g: Tensor, saved: Tensor, affine: Tensor, parts: int, post_magnitude: float, post_eps: float
) -> Tensor:
    form = Form(parts, post_magnitude, post_eps)
    return post_backward(g.contiguous(), saved.contiguous(), affine, form)


# What a fake op is not given has its default: settings are the last ones of `pre` and of its backward.


def _given(settings: tuple[Any, ...] | list[Any], at: int) -> Any:
    return settings[at] if len(settings) > at else None


@register_fake("megatron_mhc::pre")
def _(x: Tensor, weight: Tensor, affine: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    T, n, C = x.shape
    M, f32 = weight.shape[0], torch.float32
    saved, coefficients = (x.new_empty(T, rows, dtype=f32) for rows in (M + 1, M))
    norm_saved = _none(saved) if _given(settings, 8) is None else saved.new_empty(T, n + 1)
    on = _none(saved) if _given(settings, 11) is None else saved.new_empty(T, n)
    return x.new_empty(T, C), *_tunnels(x), saved, coefficients, norm_saved, on


@register_fake("megatron_mhc::pre_backward")
def _(x: Tensor, g: Tensor, f: Tensor, dl: Tensor, weight: Tensor, affine: Tensor, *more: Any) -> Any:
    saved, _norm_saved, *settings = more
    of_norm, h_pre = (_none(saved) if t is None else t for t in (_given(settings, 8), _given(settings, 11)))
    return tuple(t.new_empty(t.shape) for t in (x, weight, affine, of_norm, h_pre))


@register_fake("megatron_mhc::post_res")
def _(g_tunnel: Tensor, f_tunnel: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("megatron_mhc::post_res_backward")
def _(g: Tensor, *_: Any) -> Tensor:
    return g.new_empty(g.shape[0], g.shape[2])


def _keep_for_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, saved, coefficients, norm_saved, on = output
    *options, norm_weight, read_norm_eps, zero_centered, h_pre = inputs[3:]
    ctx.save_for_backward(*inputs[:3], norm_weight, h_pre, saved, norm_saved)
    ctx.options, ctx.of_norm = options, (read_norm_eps, zero_centered)
    ctx.mark_non_differentiable(saved, coefficients, norm_saved, *([on] if h_pre is None else []))
    ctx.set_materialize_grads(False)


def _gradients_of_pre(ctx: Any, dl: Tensor | None, g: Tensor | None, f: Tensor | None, *others: Any) -> Any:
    x, weight, affine, norm_weight, h_pre, saved, norm_saved = ctx.saved_tensors
    dl = torch.zeros_like(x[:, 0]) if dl is None else dl  # the layer input reaches no loss
    if g is None or f is None:  # no post_res downstream, so f counts for nothing
        g, f = torch.zeros_like(x), torch.zeros_like(dl)
    of_norm = norm_weight, *ctx.of_norm
    *grads, d_norm_weight, d_h_pre = _pre_backward(
        x, g, f, dl, weight, affine, saved, norm_saved, *ctx.options, *of_norm, h_pre, others[-1]
    )
    d_norm_weight = None if norm_weight is None else d_norm_weight
    return *grads, *[None] * 8, d_norm_weight, None, None, None if h_pre is None else d_h_pre


def _keep_for_post_res(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, f, _coefficients, saved, affine, parts, post_magnitude, post_eps = inputs
    ctx.save_for_backward(f, saved, affine)
    ctx.form = parts, post_magnitude, post_eps


def _gradients_of_post_res(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    f, saved, affine = ctx.saved_tensors
    return g, f, None, _post_backward(g, saved, affine, *ctx.form), *[None] * 6


register_autograd(pre, _gradients_of_pre, setup_context=_keep_for_pre)
register_autograd(post_res, _gradients_of_post_res, setup_context=_keep_for_post_res)
