"""The operations of `autograd` as ops of `torch.library`, with their autograd: what torch.compile traces.

The scheme is that of `autograd`, with nothing but tensors between forward and backward. `pre` returns two
tensors that no one reads: the tunnels. `post_res` takes them, and its backward returns g as the "gradient"
of the first and f as that of the second, so autograd hands both to the backward of `pre`.

No link between connections: a compiled graph does not say which operation wrote x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake

from megatron_mhc.ops.kernels import BY_NAME
from megatron_mhc.ops.options import Options
from megatron_mhc.ops.triton.common import mapping_rows
from megatron_mhc.ops.triton.post_res import post_backward, post_res_forward

# Inductor may hand an op other strides than it traced; contiguous() of what is contiguous does nothing.


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pre_forward`: layer input, tunnels of g [T, n, C] and of f [T, C], saved, coefficients."""
    layer_input, saved, coefficients = BY_NAME[backend].pre_forward(
        x.contiguous(),
        weight.contiguous(),
        affine,
        Options(norm_eps, iterations, deepseek_v4, reserved_sms),
    )
    return layer_input, *_tunnels(x), saved, coefficients


@custom_op("megatron_mhc::pre_backward", mutates_args=())
def _pre_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor,
    dl: Tensor,
    weight: Tensor,
    affine: Tensor,
    saved: Tensor,
    norm_eps: float,
    iterations: int,
    deepseek_v4: bool,
    reserved_sms: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_weight, d_affine, _ = (
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
            Options(norm_eps, iterations, deepseek_v4, reserved_sms),
        )
    )
    return dx, d_weight, d_affine


@custom_op("megatron_mhc::post_res", mutates_args=())
def post_res(
    g_tunnel: Tensor,
    f_tunnel: Tensor,
    x: Tensor,
    f: Tensor,
    coefficients: Tensor,
    saved: Tensor,
    affine: Tensor,
) -> Tensor:
    """`post_res_forward`, given what `pre` returned; `pre` alone gives x a gradient."""
    return post_res_forward(x.contiguous(), f.contiguous(), coefficients.contiguous())


@custom_op("megatron_mhc::post_res_backward", mutates_args=())
def _post_backward(g: Tensor, saved: Tensor, affine: Tensor) -> Tensor:
    return post_backward(g.contiguous(), saved.contiguous(), affine)


@register_fake("megatron_mhc::pre")
def _(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    T, n, C = x.shape
    M, f32 = mapping_rows(n), torch.float32
    return x.new_empty(T, C), *_tunnels(x), x.new_empty(T, M + 1, dtype=f32), x.new_empty(T, M, dtype=f32)


@register_fake("megatron_mhc::pre_backward")
def _(x: Tensor, g: Tensor, f: Tensor, dl: Tensor, weight: Tensor, affine: Tensor, *_: Any) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, weight, affine))


@register_fake("megatron_mhc::post_res")
def _(g_tunnel: Tensor, f_tunnel: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("megatron_mhc::post_res_backward")
def _(g: Tensor, *_: Any) -> Tensor:
    return g.new_empty(g.shape[0], g.shape[2])


def _keep_for_pre(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, saved, coefficients = output
    ctx.save_for_backward(*inputs[:3], saved)
    ctx.options = inputs[3:]
    ctx.mark_non_differentiable(saved, coefficients)
    ctx.set_materialize_grads(False)


def _gradients_of_pre(ctx: Any, dl: Tensor | None, g: Tensor | None, f: Tensor | None, *_: Any) -> Any:
    x, weight, affine, saved = ctx.saved_tensors
    dl = torch.zeros_like(x[:, 0]) if dl is None else dl  # the layer input reaches no loss
    if g is None or f is None:  # no post_res downstream, so f counts for nothing
        g, f = torch.zeros_like(x), torch.zeros_like(dl)
    return *_pre_backward(x, g, f, dl, weight, affine, saved, *ctx.options), *[None] * 5


def _keep_for_post_res(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    *_, f, _coefficients, saved, affine = inputs
    ctx.save_for_backward(f, saved, affine)


def _gradients_of_post_res(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    f, saved, affine = ctx.saved_tensors
    return g, f, None, _post_backward(g, saved, affine), *[None] * 3


register_autograd(pre, _gradients_of_pre, setup_context=_keep_for_pre)
register_autograd(post_res, _gradients_of_post_res, setup_context=_keep_for_post_res)
