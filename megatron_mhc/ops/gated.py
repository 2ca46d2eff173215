"""The gated residual of Qwen4-Exp in plain torch: how it reads the streams, and what it writes them with.

    y    = RMS(x) * (1 + w)                    of each stream by itself
    l    = mean_j sigmoid(U silu(D y / n))_j * y_j      a gate for each channel, of low rank
    h    = 2 sigmoid(J y / n)                  a weight for each stream
    x'_j = x_j + h_j F(l)                      `reference.write`: H_res is the identity

Shapes: T tokens, n streams, C channels of one stream, r the rank.
    x  [T, n, C]   w [n*C]   D [r, n*C]   U [n*C, r]   J [n, n*C]
D, U and J are ordinary matrices, multiplied in their own dtype; what is between them is of the coefficient
dtype. torch.autocast changes nothing.

`read` is the definition. `read_lean` keeps x alone for its backward pass, which computes y and the gates
again: autograd would keep ten times as much as bf16 streams take.

Source: transformers 5.23, `Qwen4ExpTextGatedResidual`; Megatron-LM #7393, `GatedResidualHyperConnection`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mhc.ops.autocast import LINEAR, outside, product
from megatron_mhc.ops.reference import coefficient_dtype


class Weights(NamedTuple):
    """w [n*C], D [r, n*C], U [n*C, r] and J [n, n*C], of one dtype; J is None where nothing is written."""

    norm: Tensor
    down: Tensor
    up: Tensor
    inject: Tensor | None


class Logits(NamedTuple):
    """The inputs of the two sigmoids, of the gates [T, n, C] and of h [T, n], in the coefficient dtype."""

    gate: Tensor
    inject: Tensor | None


class Read(NamedTuple):
    """What `read` returns.

    layer_input: [T, C] in x's dtype.
    h_pre: [T, n], detached: by how much the layer input has of each normalised stream, mean over channels.
    h_post: [T, n], or None without J; both in the coefficient dtype.
    """

    layer_input: Tensor
    h_pre: Tensor
    h_post: Tensor | None


def stream_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each stream of x: [T, n, C] by itself, with the weight 1 + w, in the coefficient dtype."""
    wide = x.to(coefficient_dtype(x))
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide * inverse_rms * (1.0 + weight.to(wide.dtype).view(x.shape[1:]))


def logits(y: Tensor, weights: Weights) -> Logits:
    """The logits of normalised streams y: [T, n, C]."""
    tokens, n, _ = y.shape
    flat = y.flatten(1).to(weights.down.dtype)
    hidden = F.silu(_project(flat, weights.down, y.dtype) / n)
    gate = _project(hidden.to(weights.up.dtype), weights.up, y.dtype)
    inject = None if weights.inject is None else _project(flat, weights.inject, y.dtype) / n
    return Logits(gate.view(y.shape), inject)


def _project(a: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return product(LINEAR, a, weight).to(dtype)


def read(x: Tensor, weights: Weights, norm_eps: float) -> Read:
    """Read the layer input from the streams, and how strongly each of them is written.

    Args:
        x: [T, n, C]; norm_eps: added to the mean square of each stream.
    """
    y = stream_norm(x, weights.norm, norm_eps)
    of_gate, of_inject = logits(y, weights)
    gate = of_gate.sigmoid()
    layer_input = (gate * y).mean(dim=1).to(x.dtype)
    h_pre = gate.detach().mean(dim=-1) / x.shape[1]
    return Read(layer_input, h_pre, None if of_inject is None else 2.0 * of_inject.sigmoid())


def read_lean(x: Tensor, weights: Weights, norm_eps: float) -> Read:
    """`read`, whose backward pass starts from x and the weights alone."""
    if torch.compiler.is_compiling():  # which chooses by itself what to keep
        return read(x, weights, norm_eps)
    layer_input, h_pre, h_post = _Read.apply(x, *weights, norm_eps)
    return Read(layer_input, h_pre, h_post)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, norm: Tensor, down: Tensor, up: Tensor, inject: Tensor | None, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(x, norm, down, up, inject)
        ctx.norm_eps = norm_eps
        ctx.set_materialize_grads(False)
        found = read(x, Weights(norm, down, up, inject), norm_eps)
        ctx.mark_non_differentiable(found.h_pre)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dl: Tensor | None, _: None, dh: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        with outside(x.device.type):
            return *read_backward(x, Weights(*weights), ctx.norm_eps, dl, dh), None


def read_backward(
    x: Tensor, weights: Weights, norm_eps: float, dl: Tensor | None, dh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, w, D, U and J, of those of the layer input [T, C] and of h_post [T, n]."""
    norm, down, up, inject = weights
    tokens, n, width = x.shape
    wide = x.to(coefficient_dtype(x))
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm_eps)
    unit, scale = wide * inverse_rms, 1.0 + norm.to(wide.dtype).view(n, width)
    y = unit * scale
    flat = y.flatten(1).to(down.dtype)
    d_down, d_up, d_inject = torch.zeros_like(down), torch.zeros_like(up), None
    dy, d_flat = torch.zeros_like(y), y.new_zeros(tokens, n * width)
    if dl is not None:
        low = _project(flat, down, y.dtype) / n
        sigmoid = low.sigmoid()
        hidden = (low * sigmoid).to(up.dtype)
        gate = _project(hidden, up, y.dtype).view(y.shape).sigmoid()
        each = dl.to(y.dtype).unsqueeze(1) / n
        dy = gate * each
        d_gate = (y * each * gate * (1.0 - gate)).flatten(1).to(up.dtype)
        d_up = d_gate.t() @ hidden
        d_low = (d_gate @ up).to(y.dtype) * sigmoid * (1.0 + low * (1.0 - sigmoid)) / n
        d_low = d_low.to(down.dtype)
        d_down = d_low.t() @ flat
        d_flat = (d_low @ down).to(y.dtype)
    if inject is not None:
        d_inject = torch.zeros_like(inject)
        if dh is not None:
            sigmoid = (_project(flat, inject, y.dtype) / n).sigmoid()
            d_logits = (2.0 * dh * sigmoid * (1.0 - sigmoid) / n).to(inject.dtype)
            d_inject = d_logits.t() @ flat
            d_flat = d_flat + (d_logits @ inject).to(y.dtype)
    dy = dy + d_flat.view(y.shape)
    d_norm = (dy * unit).sum(dim=0).flatten().to(norm.dtype)
    d_unit = dy * scale
    dx = inverse_rms * (d_unit - unit * (d_unit * unit).mean(dim=-1, keepdim=True))
    return dx.to(x.dtype), d_norm, d_down, d_up, d_inject
