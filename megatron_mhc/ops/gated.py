"""The gated residual of Qwen4-Exp in plain torch: how it reads the streams, and what it writes them with.

    y    = RMS(x) * (1 + w)                    of each stream by itself
    l    = mean_j sigmoid(U silu(D y / n))_j * y_j      a gate for each channel, of low rank
    h    = 2 sigmoid(J y / n)                  a weight for each stream
    x'_j = x_j + h_j F(l)                      `reference.write`: H_res is the identity

Shapes: T tokens, n streams, C channels of one stream, r the rank.
    x  [T, n, C]   w [n*C]   D [r, n*C]   U [n*C, r]   J [n, n*C]
D, U and J are ordinary matrices, multiplied in their own dtype; what is between them is of the coefficient
dtype. torch.autocast changes nothing.

Source: transformers 5.23, `Qwen4ExpTextGatedResidual`; Megatron-LM #7393, `GatedResidualHyperConnection`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mhc.ops.autocast import LINEAR, product
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
