"""The mapping gradients (Triton): what the coefficients of every token receive.

One launch reads x, g, f and dl once for the products over C that the coefficients' gradients are made of,
and turns them, in registers, into the gradient of the raw projection.

Shapes as in `pre`; g [T, n, C] is the gradient of x' as it came, dl [T, C] that of the layer input.

Where dl is the gradient of a folded norm's output y = w l r, r = 1/rms(l), with u = w dl the layer input's is
r (u - k l), k = r^2 <l, u> / C. So the products with u that are summed here give those with it:
<x_i, .> = r (<x_i, u> - k <x_i, l>).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.options import HandedBack, Options, ReadNorm
from megatron_mhc.ops.triton.common import (
    INTERPRETED,
    load_norm_weight,
    load_output,
    mapping_block,
    mapping_rows,
    power_of_two,
)
from megatron_mhc.ops.triton.sinkhorn import sinkhorn_bwd, unfused_product

VECTOR = tl.constexpr(8)  # channels a thread sums before anything is exchanged


@triton.jit
def _dots_kernel(
    x, g, f, f_bias, dh_post, dl, saved, affine, norm_weight, norm_saved, given, d_handed_on, d_given,
    d, mappings, partial, turns, T, C, TURNS,
    N: tl.constexpr, MP: tl.constexpr, ITERATIONS: tl.constexpr, V4: tl.constexpr, NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, BT: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Gradients per token.

    d [T, MP]: of the raw projection; column M holds the factor of x from the norm. mappings [T, N + N*N]:
    what l was read with, and h_res, replayed; with NORM two columns more, r and r k. partial [programs, 2,
    M]: sums over this program's tokens of dlogit and of dlogit * u. turns [TURNS]: set to zero for the next
    launch. dh_post [T, N]: None where f makes it. given: [T, N], None or what l was read with in place of
    h_pre; d_given [T, N]: its gradient; d_handed_on [T, N]: that of h_pre, None for zero.
    """
    M: tl.constexpr = 2 * N + N * N
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < T
    if tl.program_id(0) == 0:
        for k in tl.range(0, TURNS, 128):
            place = k + tl.arange(0, 128)
            tl.store(turns + place, tl.zeros([128], tl.int32), mask=place < TURNS)
    t3 = t[:, None, None]
    c3 = tl.arange(0, G)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    acc = ()  # [BT, G] each: dl.x_j, then g_i.f, then g_i.x_j
    for _ in tl.static_range(M):
        acc = acc + (tl.zeros([BT, G], tl.float32),)
    for c0 in tl.range(0, C, G * VECTOR):
        c = c0 + c3
        keep = live[:, None, None] & (c < C)
        if dh_post is None:
            fv = load_output(f, f_bias, t3 * C + c, c, C, keep)
        dv = tl.load(dl + t3 * C + c, mask=keep, other=0.0).to(tl.float32)
        if NORM:
            dv *= load_norm_weight(norm_weight, c, C, ZERO_CENTERED)
        xs = ()
        for j in tl.static_range(N):
            xs = xs + (tl.load(x + (t3 * N + j) * C + c, mask=keep, other=0.0).to(tl.float32),)
        with_dl = ()
        for j in tl.static_range(N):
            with_dl = with_dl + (acc[j] + tl.sum(dv * xs[j], axis=2),)
        with_f = ()
        with_x = ()
        for i in tl.static_range(N):
            gv = tl.load(g + (t3 * N + i) * C + c, mask=keep, other=0.0).to(tl.float32)
            if dh_post is None:
                with_f = with_f + (acc[N + i] + tl.sum(gv * fv, axis=2),)
            else:
                with_f = with_f + (acc[N + i],)
            for j in tl.static_range(N):
                with_x = with_x + (acc[2 * N + i * N + j] + tl.sum(gv * xs[j], axis=2),)
        acc = with_dl + with_f + with_x

    n1 = tl.arange(0, N)
    d_pre = tl.zeros([BT, N], tl.float32)
    d_post = tl.zeros([BT, N], tl.float32)
    d_res = tl.zeros([BT, N, N], tl.float32)
    for i in tl.static_range(N):
        d_pre += tl.where(n1[None, :] == i, tl.sum(acc[i], axis=1)[:, None], 0.0)
        d_post += tl.where(n1[None, :] == i, tl.sum(acc[N + i], axis=1)[:, None], 0.0)
        for j in tl.static_range(N):
            if V4:  # comb is H_res transposed
                here = (n1[None, :, None] == j) & (n1[None, None, :] == i)
            else:
                here = (n1[None, :, None] == i) & (n1[None, None, :] == j)
            d_res += tl.where(here, tl.sum(acc[2 * N + i * N + j], axis=1)[:, None, None], 0.0)

    if dh_post is not None:
        d_post = tl.load(dh_post + t[:, None] * N + n1[None, :], mask=live[:, None], other=0.0)

    ij = n1[:, None] * N + n1[None, :]
    row = saved + t * (M + 1)
    u_pre = tl.load(row[:, None] + n1[None, :], mask=live[:, None], other=0.0)
    u_post = tl.load(row[:, None] + N + n1[None, :], mask=live[:, None], other=0.0)
    u_res = tl.load(row[:, None, None] + 2 * N + ij[None, :, :], mask=live[:, None, None], other=0.0)
    inverse_rms = tl.load(row + M, mask=live, other=0.0)
    a_pre, a_post, a_res = tl.load(affine + M), tl.load(affine + M + 1), tl.load(affine + M + 2)
    s_pre = tl.sigmoid(u_pre * a_pre + tl.load(affine + n1)[None, :])
    s_post = tl.sigmoid(u_post * a_post + tl.load(affine + N + n1)[None, :])
    read = s_pre
    if V4:
        read = s_pre + 1e-6
    if given is not None:
        read = tl.load(given + t[:, None] * N + n1[None, :], mask=live[:, None], other=0.0)
    if NORM:
        row = norm_saved + t * (N + 1)
        with_l = tl.load(row[:, None] + n1[None, :], mask=live[:, None], other=0.0)
        of_l = tl.load(row + N, mask=live, other=0.0)
        along = of_l * of_l * tl.sum(unfused_product(d_pre, read), axis=1) / C
        d_pre = of_l[:, None] * (d_pre - along[:, None] * with_l)
    if given is not None:
        tl.store(d_given + t[:, None] * N + n1[None, :], d_pre, mask=live[:, None])
        if d_handed_on is None:
            d_pre = tl.zeros([BT, N], tl.float32)
        else:
            d_pre = tl.load(d_handed_on + t[:, None] * N + n1[None, :], mask=live[:, None], other=0.0)
    logits = u_res * a_res + tl.load(affine + 2 * N + ij)[None, :, :]
    h_res, d_res = sinkhorn_bwd(logits, d_res, ITERATIONS, V4)
    d_pre = d_pre * s_pre * (1 - s_pre)
    d_post = d_post * 2 * s_post * (1 - s_post)

    # Rows behind T hold zeros: everything they were made of was loaded as zero.
    out = partial + tl.program_id(0).to(tl.int64) * (2 * M)
    tl.store(out + n1, tl.sum(d_pre, axis=0))
    tl.store(out + N + n1, tl.sum(d_post, axis=0))
    tl.store(out + 2 * N + ij, tl.sum(d_res, axis=0))
    tl.store(out + M + n1, tl.sum(unfused_product(d_pre, u_pre), axis=0))
    tl.store(out + M + N + n1, tl.sum(unfused_product(d_post, u_post), axis=0))
    tl.store(out + M + 2 * N + ij, tl.sum(unfused_product(d_res, u_res), axis=0))

    # From here of u = projection / r: d/dx of 1/r = -x / (n C r^3) gives the factor in column M.
    d_pre, d_post, d_res = d_pre * a_pre, d_post * a_post, d_res * a_res
    inner = tl.sum(unfused_product(d_pre, u_pre), axis=1) + tl.sum(unfused_product(d_post, u_post), axis=1)
    inner += tl.sum(tl.sum(unfused_product(d_res, u_res), axis=2), axis=1)
    d_pre, d_post = d_pre * inverse_rms[:, None], d_post * inverse_rms[:, None]
    d_res = d_res * inverse_rms[:, None, None]
    row = d + t * MP
    tl.store(row[:, None] + n1[None, :], d_pre, mask=live[:, None])
    tl.store(row[:, None] + N + n1[None, :], d_post, mask=live[:, None])
    tl.store(row[:, None, None] + 2 * N + ij[None, :, :], d_res, mask=live[:, None, None])
    tl.store(row + M, -inner * inverse_rms * inverse_rms / (N * C), mask=live)
    row = mappings + t * (N + N * N + (2 if NORM else 0))
    if NORM:
        tl.store(row + N + N * N, of_l, mask=live)
        tl.store(row + N + N * N + 1, of_l * along, mask=live)
    if V4:
        ij = n1[:, None] + n1[None, :] * N
    tl.store(row[:, None] + n1[None, :], read, mask=live[:, None])
    tl.store(row[:, None, None] + N + ij[None, :, :], h_res, mask=live[:, None, None])


def mapping_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor | None,
    dl: Tensor,
    affine: Tensor,
    saved: Tensor,
    turns: Tensor,
    options: Options,
    *,
    f_bias: Tensor | None = None,
    dh_post: Tensor | None = None,
    norm: ReadNorm | None = None,
    norm_saved: Tensor | None = None,
    handed: HandedBack | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the raw projection [T, MP]; h_pre and h_res as applied, [T, n + n*n]; partial sums; fp32.

    With a norm, h_pre and h_res are followed by r and r k, [T, n + n*n + 2].

    Clears `turns` int32, which the launch behind this one counts with.

    Args:
        x, affine, saved, norm, norm_saved: of `pre_forward`; g: [T, n, C]; f, dl: [T, C].
        f_bias: as in `post_res_forward`; dh_post: [T, n] fp32 in place of f, which is then not read.
        handed: what l was read with in place of h_pre.
    """
    T, n, C = x.shape
    M, MP = mapping_rows(n), mapping_block(n)
    BT, G = (8, power_of_two(C) // 8) if INTERPRETED else (2, min(32, power_of_two(C) // 8))
    programs = triton.cdiv(T, BT)
    f32: dict[str, Any] = dict(device=x.device, dtype=torch.float32)
    d, mappings = torch.empty(T, MP, **f32), torch.empty(T, n + n * n + 2 * (norm is not None), **f32)
    partial = torch.empty(programs, 2, M, **f32)
    _dots_kernel[(programs,)](
        x, g, f, f_bias, dh_post, dl, saved, affine, norm and norm.weight, norm_saved,
        *(handed or (None, None, None)), d, mappings, partial, turns, T, C, turns.numel(),
        n, MP, options.iterations, options.deepseek_v4, norm is not None,
        norm is not None and norm.zero_centered, BT, G, num_warps=2 if n < 8 else 4,
    )  # fmt: skip
    return d, mappings, partial
