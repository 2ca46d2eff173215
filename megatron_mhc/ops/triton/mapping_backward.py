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

from megatron_mhc.ops.options import WRITES, HandedBack, Options, ReadNorm
from megatron_mhc.ops.triton.common import (
    INTERPRETED,
    load_norm_weight,
    load_output,
    mapping_block,
    power_of_two,
)
from megatron_mhc.ops.triton.sinkhorn import sinkhorn_bwd, unfused_product

VECTOR = tl.constexpr(8)  # channels a thread sums before anything is exchanged


@triton.jit
def _dots_kernel(
    x, g, f, f_bias, dh_post, dl, saved, affine, norm_weight, norm_saved, given, d_handed_on, d_given,
    d, mappings, partial, turns, T, C, TURNS,
    N: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, MAGNITUDE: tl.constexpr, MP: tl.constexpr,
    ITERATIONS: tl.constexpr, V4: tl.constexpr, NORM: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    BT: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Gradients per token.

    d [T, MP]: of the raw projection; column M holds the factor of x from the norm. mappings [T, H]: what l
    was read with, and h_res, replayed, if they are learned; with NORM two columns more, r and r k. partial
    [programs, 2, M]: sums over this program's tokens of dlogit and of dlogit * u. turns [TURNS]: set to zero
    for the next launch. dh_post [T, N]: None where f makes it. given: [T, N], None or what l was read with in
    place of h_pre; d_given [T, N]: its gradient; d_handed_on [T, N]: that of h_pre, None for zero.
    """
    READS: tl.constexpr = PARTS % 2
    WRITES: tl.constexpr = PARTS // 2 % 2
    MIXES: tl.constexpr = PARTS // 4
    WRITE_AT: tl.constexpr = N * READS
    MIX_AT: tl.constexpr = WRITE_AT + N * WRITES
    M: tl.constexpr = MIX_AT + N * N * MIXES
    # Products that are summed: with dl, then with f, then of g and x.
    OF_DL: tl.constexpr = N * (1 if READS or NORM else 0)
    OF_F: tl.constexpr = N * (WRITES if dh_post is None else 0)
    OF_X: tl.constexpr = N * N * MIXES
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < T
    if tl.program_id(0) == 0:
        for k in tl.range(0, TURNS, 128):
            place = k + tl.arange(0, 128)
            tl.store(turns + place, tl.zeros([128], tl.int32), mask=place < TURNS)
    t3 = t[:, None, None]
    c3 = tl.arange(0, G)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    acc = ()  # [BT, G] each
    for _ in tl.static_range(OF_DL + OF_F + OF_X):
        acc = acc + (tl.zeros([BT, G], tl.float32),)
    if OF_DL + OF_F + OF_X > 0:
        for c0 in tl.range(0, C, G * VECTOR):
            c = c0 + c3
            keep = live[:, None, None] & (c < C)
            xs = ()
            if OF_DL + OF_X > 0:
                for j in tl.static_range(N):
                    xs = xs + (tl.load(x + (t3 * N + j) * C + c, mask=keep, other=0.0).to(tl.float32),)
            if OF_F > 0:
                fv = load_output(f, f_bias, t3 * C + c, c, C, keep)
            grown = ()
            if OF_DL > 0:
                dv = tl.load(dl + t3 * C + c, mask=keep, other=0.0).to(tl.float32)
                if NORM:
                    dv *= load_norm_weight(norm_weight, c, C, ZERO_CENTERED)
                for j in tl.static_range(N):
                    grown = grown + (acc[j] + tl.sum(dv * xs[j], axis=2),)
            with_f = ()
            with_x = ()
            if OF_F + OF_X > 0:
                for i in tl.static_range(N):
                    gv = tl.load(g + (t3 * N + i) * C + c, mask=keep, other=0.0).to(tl.float32)
                    if OF_F > 0:
                        with_f = with_f + (acc[OF_DL + i] + tl.sum(gv * fv, axis=2),)
                    if OF_X > 0:
                        for j in tl.static_range(N):
                            of_x = tl.sum(gv * xs[j], axis=2)
                            with_x = with_x + (acc[OF_DL + OF_F + i * N + j] + of_x,)
            acc = grown + with_f + with_x

    n1 = tl.arange(0, NP)
    ij = n1[:, None] * N + n1[None, :]
    real = n1 < N
    square = real[:, None] & real[None, :]
    keep1 = live[:, None]
    keep2 = live[:, None, None]
    if N != NP:
        keep1 = keep1 & real[None, :]
        keep2 = keep2 & square[None, :, :]
    row = saved + t * (M + 1)
    inner = tl.zeros([BT], tl.float32)
    if M > 0:
        inverse_rms = tl.load(row + M, mask=live, other=0.0)
    # Rows behind T hold zeros: everything they were made of was loaded as zero.
    out = partial + tl.program_id(0).to(tl.int64) * (2 * M)
    to = d + t * MP
    replayed = mappings + t * (N * READS + N * N * MIXES + (2 if NORM else 0))

    # From du, of u = projection / r, on: d/dx of 1/r = -x / (n C r^3) gives the factor in column M.
    if OF_DL > 0:
        d_pre = tl.zeros([BT, NP], tl.float32)
        for i in tl.static_range(N):
            d_pre += tl.where(n1[None, :] == i, tl.sum(acc[i], axis=1)[:, None], 0.0)
        if READS:
            u_pre = tl.load(row[:, None] + n1[None, :], mask=keep1, other=0.0)
            a_pre = tl.load(affine + M)
            s_pre = tl.sigmoid(u_pre * a_pre + tl.load(affine + n1, mask=real, other=0.0)[None, :])
            h_pre = s_pre
            if V4:
                h_pre = s_pre + 1e-6
            if given is not None:
                h_pre = tl.load(given + t[:, None] * N + n1[None, :], mask=keep1, other=0.0)
            tl.store(replayed[:, None] + n1[None, :], h_pre, mask=keep1)
        else:
            h_pre = tl.full([BT, NP], 1.0 / N, tl.float32)
        if NORM:
            norm_row = norm_saved + t * (N + 1)
            of_l = tl.load(norm_row + N, mask=live, other=0.0)
            along = of_l * of_l * tl.sum(unfused_product(d_pre, h_pre), axis=1) / C
            tl.store(replayed + N * READS + N * N * MIXES, of_l, mask=live)
            tl.store(replayed + N * READS + N * N * MIXES + 1, of_l * along, mask=live)
            if READS:
                with_l = tl.load(norm_row[:, None] + n1[None, :], mask=keep1, other=0.0)
                d_pre = of_l[:, None] * (d_pre - along[:, None] * with_l)
        if READS:
            if given is not None:
                tl.store(d_given + t[:, None] * N + n1[None, :], d_pre, mask=keep1)
                if d_handed_on is None:
                    d_pre = tl.zeros([BT, NP], tl.float32)
                else:
                    d_pre = tl.load(d_handed_on + t[:, None] * N + n1[None, :], mask=keep1, other=0.0)
            d_pre = d_pre * s_pre * (1 - s_pre)
            tl.store(out + n1, tl.sum(d_pre, axis=0), mask=real)
            tl.store(out + M + n1, tl.sum(unfused_product(d_pre, u_pre), axis=0), mask=real)
            d_pre = d_pre * a_pre
            inner += tl.sum(unfused_product(d_pre, u_pre), axis=1)
            tl.store(to[:, None] + n1[None, :], d_pre * inverse_rms[:, None], mask=keep1)
    if WRITES:
        d_post = tl.zeros([BT, NP], tl.float32)
        if dh_post is None:
            for i in tl.static_range(N):
                d_post += tl.where(n1[None, :] == i, tl.sum(acc[OF_DL + i], axis=1)[:, None], 0.0)
        else:
            d_post = tl.load(dh_post + t[:, None] * N + n1[None, :], mask=keep1, other=0.0)
        u_post = tl.load(row[:, None] + WRITE_AT + n1[None, :], mask=keep1, other=0.0)
        a_post = tl.load(affine + M + READS)
        bias = tl.load(affine + WRITE_AT + n1, mask=real, other=0.0)[None, :]
        s_post = tl.sigmoid(u_post * a_post + bias)
        d_post = d_post * MAGNITUDE * s_post * (1 - s_post)
        tl.store(out + WRITE_AT + n1, tl.sum(d_post, axis=0), mask=real)
        tl.store(out + M + WRITE_AT + n1, tl.sum(unfused_product(d_post, u_post), axis=0), mask=real)
        d_post = d_post * a_post
        inner += tl.sum(unfused_product(d_post, u_post), axis=1)
        tl.store(to[:, None] + WRITE_AT + n1[None, :], d_post * inverse_rms[:, None], mask=keep1)
    if MIXES:
        d_res = tl.zeros([BT, NP, NP], tl.float32)
        for i in tl.static_range(N):
            for j in tl.static_range(N):
                if V4:  # comb is H_res transposed
                    here = (n1[None, :, None] == j) & (n1[None, None, :] == i)
                else:
                    here = (n1[None, :, None] == i) & (n1[None, None, :] == j)
                one = tl.sum(acc[OF_DL + OF_F + i * N + j], axis=1)
                d_res += tl.where(here, one[:, None, None], 0.0)
        u_res = tl.load(row[:, None, None] + MIX_AT + ij[None, :, :], mask=keep2, other=0.0)
        a_res = tl.load(affine + M + READS + WRITES)
        bias = tl.load(affine + MIX_AT + ij, mask=square, other=0.0)[None, :, :]
        h_res, d_res = sinkhorn_bwd(u_res * a_res + bias, d_res, N, NP, ITERATIONS, V4)
        tl.store(out + MIX_AT + ij, tl.sum(d_res, axis=0), mask=square)
        tl.store(out + M + MIX_AT + ij, tl.sum(unfused_product(d_res, u_res), axis=0), mask=square)
        d_res = d_res * a_res
        inner += tl.sum(tl.sum(unfused_product(d_res, u_res), axis=2), axis=1)
        d_res = d_res * inverse_rms[:, None, None]
        tl.store(to[:, None, None] + MIX_AT + ij[None, :, :], d_res, mask=keep2)
        if V4:
            ij = n1[:, None] + n1[None, :] * N
        tl.store(replayed[:, None, None] + N * READS + ij[None, :, :], h_res, mask=keep2)
    if M > 0:
        tl.store(to + M, -inner * inverse_rms * inverse_rms / (N * C), mask=live)


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
    """Gradients of the raw projection [T, MP], h_pre and h_res as applied [T, H], partial sums; all fp32.

    Of n of h_pre and n*n of h_res there are those that are learned, and with a norm r and r k behind them.

    Clears `turns` int32, which the launch behind this one counts with.

    Args:
        x, affine, saved, norm, norm_saved: of `pre_forward`; g: [T, n, C]; f, dl: [T, C].
        f_bias: as in `post_res_forward`; dh_post: [T, n] fp32 in place of f, which is then not read.
        handed: what l was read with in place of h_pre.
    """
    T, n, C = x.shape
    form = options.form
    M, MP = form.rows(n), mapping_block(form.rows(n))
    H = form._replace(parts=form.parts & ~WRITES).rows(n) + 2 * (norm is not None)
    BT, G = (8, power_of_two(C) // 8) if INTERPRETED else (2, min(32, power_of_two(C) // 8))
    programs = triton.cdiv(T, BT)
    f32: dict[str, Any] = dict(device=x.device, dtype=torch.float32)
    d, mappings = torch.empty(T, MP if M else 0, **f32), torch.empty(T, H, **f32)
    partial = torch.empty(programs, 2, M, **f32)
    if not M and norm is None:
        turns.zero_()
        return d, mappings, partial
    _dots_kernel[(programs,)](
        x, g, f, f_bias, dh_post, dl, saved, affine, norm and norm.weight, norm_saved,
        *(handed or (None, None, None)), d, mappings, partial, turns, T, C, turns.numel(),
        n, power_of_two(n), *form[:2], MP, options.iterations, options.deepseek_v4, norm is not None,
        norm is not None and norm.zero_centered, BT, G, num_warps=2 if n < 8 else 4,
    )  # fmt: skip
    return d, mappings, partial
