"""The definition of every mHC operation in plain torch; kernels are measured against these functions.

Shapes: T tokens, n streams, C channels of one stream, m mapping rows.
    x       [T, n, C]  streams, any floating dtype
    h_pre   [T, n]     h_post [T, n]     h_res [T, n, n]   coefficients: fp32, or fp64 where x is fp64
    weight  [m, n*C]   phi transposed; m = n (pre) + n (post) + n*n (res, row-major), absent parts left out
All names and equation numbers are those of arXiv 2512.24880. H_res multiplies a column of streams, so
row i of h_res says what output stream i reads.

torch.autocast changes nothing here: coefficients are computed and applied in their own dtype, and the
streams keep theirs, in which x' leaves whatever dtype F gave f.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mhc.ops.autocast import LINEAR, product
from megatron_mhc.ops.options import ReadNorm

DEEPSEEK_EPS = 1e-6


class Coefficients(NamedTuple):
    """h_pre [T, n], h_post [T, n], h_res [T, n, n]; fp32, or fp64 for fp64 streams."""

    h_pre: Tensor
    h_post: Tensor
    h_res: Tensor


def coefficient_dtype(x: Tensor) -> torch.dtype:
    """The dtype that mappings of x are computed and applied in: fp64 for fp64, fp32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_token(streams: Tensor, n: int) -> Tensor:
    """Streams [s, b, n*C] as x: [T, n, C], a view; of no token too."""
    s, b, wide = streams.shape
    return streams.view(s * b, n, wide // n)


def in_sequence(x: Tensor, s: int, b: int) -> Tensor:
    """x: [T, n, C] or [T, C] as [s, b, n*C] or [s, b, C], a view; of no token too."""
    return x.view(s, b, x.shape[1:].numel())


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Project exp(logits) towards the doubly stochastic matrices, columns first and rows last.

    In the log domain, where each normalisation is a log-softmax: the same numbers as dividing by sums,
    but neither overflow nor a vanished row for logits of any size.

    Args:
        logits: [..., n, n] fp32 or fp64.
        iterations: number of T_r(T_c(.)) steps, at least 1.

    Returns:
        [..., n, n] of the same dtype; rows sum to 1 to rounding, columns as far as it converged.

    Source: arXiv 2512.24880 Eq. (9), M_t = T_r(T_c(M_{t-1})), M_0 = exp(logits).
    """
    for _ in range(iterations - 1):
        logits = F.log_softmax(F.log_softmax(logits, dim=-2), dim=-1)
    return F.softmax(F.log_softmax(logits, dim=-2), dim=-1)


def sinkhorn_deepseek_v4(logits: Tensor, iterations: int, eps: float = DEEPSEEK_EPS) -> Tensor:
    """DeepSeek-V4's `comb`: softmax of the rows, then columns, then rows and columns in turn.

    Args:
        logits: [..., n, n] fp32 or fp64, indexed [stream read, stream written].
        iterations: number of column normalisations, at least 1.
        eps: added after the softmax and to every divisor.

    Returns:
        comb [..., n, n]; its transpose is H_res.
    """
    comb = F.softmax(logits, dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def normalised_projection(x: Tensor, weight: Tensor, norm_eps: float) -> Tensor:
    """RMS-normalise the flattened streams and project them.

    Args:
        x: [T, n, C]; weight: [m, n*C]; norm_eps: added to mean(x^2) inside the root.

    Returns:
        [T, m] in the coefficient dtype.

    Source: arXiv 2512.24880 Eqs. (14)-(15) and the 1/r of Eq. (16).
    """
    flat = x.flatten(1).to(coefficient_dtype(x))
    inverse_rms = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    return product(LINEAR, flat, weight.to(flat.dtype)) * inverse_rms


def mapping_logits(
    x: Tensor,
    weight: Tensor,
    alphas: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor,
    norm_eps: float,
) -> Tensor:
    """Gate the normalised projection and add the biases.

    Args:
        x: [T, n, C]; weight: [m, n*C]; bias: [m]; norm_eps: as in `normalised_projection`.
        alphas: (alpha_pre, alpha_post, alpha_res), [1] each; None where that part is fixed and absent.

    Returns:
        [T, m] in the coefficient dtype.

    Source: arXiv 2512.24880 Eq. (16), the bias after the division by r.
    """
    n = x.shape[1]
    sizes = (n, n, n * n)
    gates = [alpha.expand(size) for alpha, size in zip(alphas, sizes, strict=True) if alpha is not None]
    projection = normalised_projection(x, weight, norm_eps)
    return projection * torch.cat(gates).to(projection.dtype) + bias.to(projection.dtype)


def mhc_mappings(
    logits: Tensor,
    n: int,
    *,
    deepseek_v4: bool = False,
    post_magnitude: float = 2.0,
    post_eps: float = 0.0,
    sinkhorn_iterations: int = 20,
    dynamic_pre: bool = True,
    dynamic_post: bool = True,
    dynamic_res: bool = True,
) -> Coefficients:
    """Turn mapping logits into coefficients; a part that is not dynamic is the paper's constant.

    Args:
        logits: [T, m] of alpha * projection + bias, in the order pre, post, res; fixed parts absent.
        n: number of streams.
        post_magnitude, post_eps: h_post is magnitude * sigma(.) + eps, as in HY-V4.

    Source: arXiv 2512.24880 Eqs. (17)-(19); constants of its ablation: 1/n, 1 and I. Under
    `deepseek_v4` h_pre gains eps and the n*n logits are those of comb = H_res^T.
    """
    tokens = logits.shape[0]
    sizes = [n * dynamic_pre, n * dynamic_post, n * n * dynamic_res]
    pre_logits, post_logits, res_logits = logits.split(sizes, dim=-1)
    if dynamic_pre:
        h_pre = pre_logits.sigmoid() + (DEEPSEEK_EPS if deepseek_v4 else 0.0)
    else:
        h_pre = logits.new_full((tokens, n), 1.0 / n)
    if dynamic_post:
        h_post = post_magnitude * post_logits.sigmoid() + post_eps
    else:
        h_post = logits.new_ones(tokens, n)
    if not dynamic_res:
        h_res = torch.eye(n, dtype=logits.dtype, device=logits.device).expand(tokens, n, n)
    elif deepseek_v4:
        comb = sinkhorn_deepseek_v4(res_logits.unflatten(-1, (n, n)), sinkhorn_iterations)
        h_res = comb.transpose(-1, -2)
    else:
        h_res = sinkhorn(res_logits.unflatten(-1, (n, n)), sinkhorn_iterations)
    return Coefficients(h_pre, h_post, h_res)


def hc_mappings(
    x: Tensor,
    weight: Tensor,
    alphas: tuple[Tensor | None, Tensor | None, Tensor],
    bias: Tensor,
    norm_eps: float,
) -> Coefficients:
    """Coefficients of plain hyper-connections, the paper's unconstrained baseline.

    Args:
        x: [T, n, C].
        weight: [m, C]; rows theta_pre (1), theta_post (1), theta_res (n); fixed parts absent.
        alphas: (alpha_pre, alpha_post, alpha_res), [1] each; None fixes that part at 1/n or 1.
        bias: [m'], the biases of pre (n), post (n) and res (n*n); fixed parts absent.
        norm_eps: added to the mean square of each stream.

    Source: arXiv 2512.24880 Eq. (5): H = alpha * tanh(theta x~^T) + b, x~ normalised per stream.
    """
    tokens, n, _ = x.shape
    alpha_pre, alpha_post, alpha_res = alphas
    values = x.to(coefficient_dtype(x))
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + norm_eps)
    # [T, m, n]: theta of row m applied to stream n
    raw = torch.tanh(product("mc,tnc->tmn", weight.to(values.dtype), values))
    bias = bias.to(values.dtype)
    rows = [int(alpha_pre is not None), int(alpha_post is not None), n]
    raw_pre, raw_post, raw_res = raw.split(rows, dim=1)
    b_pre, b_post, b_res = bias.split([n * rows[0], n * rows[1], n * n])
    h_pre = values.new_full((tokens, n), 1.0 / n) if alpha_pre is None else alpha_pre * raw_pre[:, 0] + b_pre
    h_post = values.new_ones(tokens, n) if alpha_post is None else alpha_post * raw_post[:, 0] + b_post
    h_res = alpha_res * raw_res + b_res.view(n, n)
    return Coefficients(h_pre, h_post, h_res)


def pre(x: Tensor, h_pre: Tensor, norm: ReadNorm | None = None) -> Tensor:
    """Read the layer input from the streams: l = H_pre x.

    Args:
        x: [T, n, C]; h_pre: [T, n].
        norm: what stands between l and F; its output is then returned in place of l, which is not rounded.

    Returns:
        [T, C] in x's dtype, accumulated in the coefficients'.

    Source: arXiv 2512.24880 Eq. (3).
    """
    layer_input = product("tn,tnc->tc", h_pre, x.to(h_pre.dtype))
    return (layer_input if norm is None else read_norm(layer_input, *norm)).to(x.dtype)


def read_norm(layer_input: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """RMSNorm of a layer input l [..., C] in the coefficient dtype, in which it computes; see `ReadNorm`."""
    w = weight.to(layer_input.dtype) + (1.0 if zero_centered else 0.0)
    return w * layer_input * torch.rsqrt(layer_input.square().mean(dim=-1, keepdim=True) + eps)


def post_res(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """Mix the streams and write the layer output into them: x' = H_res x + H_post^T f.

    Args:
        x: [T, n, C]; f: [T, C]; h_post: [T, n]; h_res: [T, n, n].

    Returns:
        [T, n, C] in x's dtype, accumulated in the coefficients'.

    Source: arXiv 2512.24880 Eq. (3).
    """
    mixed = product("tij,tjc->tic", h_res, x.to(h_res.dtype))
    return (mixed + h_post.unsqueeze(-1) * f.to(h_post.dtype).unsqueeze(-2)).to(x.dtype)


def mix(x: Tensor, h_res: Tensor) -> Tensor:
    """What a stage sends before its last MLP: u = H_res x of x: [T, n, C] and h_res: [T, n, n], in x's dtype.

    Source: arXiv 2512.24880 Eq. (3), the first of its two terms.
    """
    return product("tij,tjc->tic", h_res, x.to(h_res.dtype)).to(x.dtype)


def write(u: Tensor, f: Tensor, h_post: Tensor) -> Tensor:
    """What the next stage makes of it: x' = u + h_post^T f of u: [T, n, C], f: [T, C], h_post: [T, n].

    Source: arXiv 2512.24880 Eq. (3), its second term added to the first.
    """
    added = h_post.unsqueeze(-1) * f.to(h_post.dtype).unsqueeze(-2)
    return (u.to(h_post.dtype) + added).to(u.dtype)


def write_backward(g: Tensor, f: Tensor, h_post: Tensor) -> tuple[Tensor, Tensor]:
    """df: [T, C] in f's dtype and dh_post: [T, n] in h_post's, of g: [T, n, C], that of `write`'s x'."""
    wide = g.to(h_post.dtype)
    df = product("tn,tnc->tc", h_post, wide).to(f.dtype)
    return df, product("tnc,tc->tn", wide, f.to(h_post.dtype))


def expand(hidden_states: Tensor, n: int) -> Tensor:
    """Copy [..., C] into n streams [..., n*C], stream outer and channel inner."""
    return hidden_states.repeat(*([1] * (hidden_states.dim() - 1)), n)


def contract(x: Tensor, how: str) -> Tensor:
    """Reduce the streams [T, n, C] to [T, C] by their `mean` or `sum`; torch accumulates in fp32 or fp64."""
    return x.mean(dim=1) if how == "mean" else x.sum(dim=1, dtype=x.dtype)


def learned_head(
    x: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor, *, norm_eps: float, deepseek_v4: bool
) -> Tensor:
    """Reduce the streams [T, n, C] to [T, C] with weights sigma(alpha * projection + bias).

    Args:
        x: [T, n, C]; weight: [n, n*C]; alpha: [1]; bias: [n].
    """
    logits = normalised_projection(x, weight, norm_eps)
    weights = torch.sigmoid(logits * alpha.to(logits.dtype) + bias.to(logits.dtype))
    return pre(x, weights + (DEEPSEEK_EPS if deepseek_v4 else 0.0))
