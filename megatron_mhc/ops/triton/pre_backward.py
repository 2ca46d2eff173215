"""pre, backward (Triton): everything that the streams and the mapping parameters receive.

`mapping_backward` reads x, g, f, dl once and leaves the gradients per token. Then one launch reads x, g and
dl, last tokens first since those are still in L2, and writes dx, complete, while dphi gathers in registers.
Where x came straight from another connection's post_res, dx is that connection's g: its df, which is made
of g alone, is written from the same registers, and nobody reads g for it again.
With a folded norm (`ReadNorm`), dl is the gradient of its output, of which that of the layer input is made in
registers, and the gradient of its weight gathers beside dphi.
No float atomics: programs that own the same columns of phi add their sums one after the other, in the order
of their tickets, so results repeat bit for bit. A program waits for an earlier ticket alone, which
runs already: no deadlock, whatever else the GPU runs and however few programs are resident.

Shapes as in `pre`; g [T, n, C] is the gradient of x' as it came, dl [T, C] that of the layer input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.options import HandedBack, Options, ReadNorm
from megatron_mhc.ops.triton.common import (
    INTERPRETED,
    add_product,
    await_turn,
    finish_turn,
    load_norm_weight,
    mapping_block,
    power_of_two,
    split,
)
from megatron_mhc.ops.triton.mapping_backward import mapping_backward
from megatron_mhc.ops.triton.post_res import add_written


@triton.jit
def _store_dphi(d_weight, total, k, inside, K, M: tl.constexpr, MP: tl.constexpr, first):
    """d_weight[:, k] = total for the first program of these columns, += total for the others."""
    m = tl.arange(0, MP)
    place = d_weight + m[None, :] * K + k[:, None]
    keep = (m < M)[None, :] & inside[:, None]
    if not first:
        total += tl.load(place, mask=keep, other=0.0)
    tl.store(place, total, mask=keep)


@triton.jit
def _reduce(
    partial, d_affine, part, P, N: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr
):
    """Sum the parts of the biases' and the alpha's gradient of a learned one of pre, post and res."""
    BEFORE: tl.constexpr = PARTS % 2 + PARTS // 2 % 2  # that have n biases
    MIXES: tl.constexpr = PARTS // 4
    M: tl.constexpr = N * BEFORE + N * N * MIXES
    MOST: tl.constexpr = NP * NP if MIXES else NP
    m = tl.arange(0, MOST)
    columns = N
    if MIXES:
        columns = tl.where(part == BEFORE, N * N, N)
    place = part * N + m
    p = tl.arange(0, BP)
    logits = tl.zeros([BP, MOST], tl.float32)
    gates = tl.zeros([BP, MOST], tl.float32)
    for p0 in tl.range(0, P, BP):
        keep = (p0 + p < P)[:, None] & (m < columns)[None, :]
        row = partial + (p0 + p)[:, None].to(tl.int64) * (2 * M) + place[None, :]
        logits += tl.load(row, mask=keep, other=0.0)
        gates += tl.load(row + M, mask=keep, other=0.0)
    tl.store(d_affine + place, tl.sum(logits, axis=0), mask=m < columns)
    tl.store(d_affine + M + part, tl.sum(tl.sum(gates, axis=0), axis=0))


@triton.jit
def _dx_kernel(
    x, g, dl, weight, d, mappings, writer, writer_affine, norm_weight, dx, df, d_weight, norm_sums, d_norm,
    turns, partial, d_affine, T, C, SLICES, RANGES, P,
    N: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, MAGNITUDE: tl.constexpr,
    POST_EPS: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    STAGES: tl.constexpr, PAIR: tl.constexpr, DPHI: tl.constexpr, DF: tl.constexpr, UPCAST: tl.constexpr,
    REDUCE: tl.constexpr, NORM: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """dx_j = sum_i h_res[i, j] g_i + h_pre_j dl + (d . weight)_j + d[M] x_j, BC channels of every RANGES-th
    block of tokens; with DPHI also d_weight; with REDUCE a program more for each learned part of d_affine;
    with DF also the df of the connection that wrote x, of this form too, from what that has saved. With NORM,
    dl is the gradient of the norm's output, and d_norm [C] that of its weight, of which norm_sums [C] fp32
    are the sums on the way.

    turns [0] counts tickets out, turns [1 + slice] the programs that have added to that slice's d_weight.
    """
    READS: tl.constexpr = PARTS % 2
    MIXES: tl.constexpr = PARTS // 4
    M: tl.constexpr = N * READS + N * (PARTS // 2 % 2) + N * N * MIXES
    BEHIND: tl.constexpr = N * READS + N * N * MIXES  # in a row of `mappings`
    H: tl.constexpr = BEHIND + (2 if NORM else 0)
    ticket = tl.atomic_add(turns, 1, sem="relaxed")
    if REDUCE and ticket >= SLICES * RANGES:
        _reduce(partial, d_affine, ticket - SLICES * RANGES, P, N, NP, PARTS, BP)
    else:
        piece = ticket // SLICES
        mine = ticket % SLICES
        c = mine * BC + tl.arange(0, BC)
        m = tl.arange(0, MP)
        inside = c < C
        weights = ()
        totals = ()
        if M > 0:
            for j in tl.static_range(N):
                rows = weight + m[:, None] * (N * C) + j * C + c[None, :]
                w = tl.load(rows, mask=(m < M)[:, None] & inside[None, :], other=0.0)
                if PAIR and not UPCAST:
                    w = w.to(tl.bfloat16)
                weights = weights + (w,)
                totals = totals + (tl.zeros([BC, MP], tl.float32),)
        if NORM:
            norm_w = load_norm_weight(norm_weight, c, C, ZERO_CENTERED)
            norm_total = tl.zeros([BC], tl.float32)
        blocks = tl.cdiv(T, BT)
        for block in tl.range(piece, blocks, RANGES, num_stages=STAGES):
            t = ((blocks - 1 - block) * BT + tl.arange(0, BT)).to(tl.int64)
            live = t < T
            keep = live[:, None] & inside[None, :]
            if M > 0:
                keep_d = live[:, None] & (m < M)[None, :]
                dv = tl.load(d + t[:, None] * MP + m[None, :], mask=keep_d, other=0.0)
                from_norm = tl.load(d + t * MP + M, mask=live, other=0.0)
            dlv = tl.load(dl + t[:, None] * C + c[None, :], mask=keep, other=0.0)
            gs = ()
            xs = ()
            for i in tl.static_range(N):
                place = (t * N + i)[:, None] * C + c[None, :]
                gs = gs + (tl.load(g + place, mask=keep, other=0.0),)
                if M > 0 or NORM:
                    xs = xs + (tl.load(x + place, mask=keep, other=0.0),)
            if DPHI:
                grown = ()
                for j in tl.static_range(N):
                    grown = grown + (add_product(totals[j], tl.trans(xs[j]), dv, PAIR, UPCAST),)
                totals = grown
            row = mappings + t * H
            if NORM:
                layer_input = tl.zeros([BT, BC], tl.float32)
                for j in tl.static_range(N):
                    if READS:
                        layer_input += tl.load(row + j, mask=live, other=0.0)[:, None] * xs[j].to(tl.float32)
                    else:
                        layer_input += xs[j].to(tl.float32) * (1.0 / N)
                inverse_rms = tl.load(row + BEHIND, mask=live, other=0.0)[:, None]
                along = tl.load(row + BEHIND + 1, mask=live, other=0.0)[:, None]
                dy = dlv.to(tl.float32)
                norm_total += tl.sum(dy * (layer_input * inverse_rms), axis=0)
                dlv = inverse_rms * (norm_w[None, :] * dy) - along * layer_input
            dfv = tl.zeros([BT, BC], tl.float32)
            for j in tl.static_range(N):
                if M == 0:
                    acc = tl.zeros([BT, BC], tl.float32)
                elif PAIR and not UPCAST:
                    high = dv.to(tl.bfloat16)
                    low = (dv - high.to(tl.float32)).to(tl.bfloat16)
                    acc = tl.dot(high, weights[j], tl.dot(low, weights[j]))
                else:
                    acc = tl.dot(dv, weights[j], input_precision="ieee" if UPCAST else "tf32x3")
                if READS:
                    acc += tl.load(row + j, mask=live, other=0.0)[:, None] * dlv.to(tl.float32)
                else:
                    acc += dlv.to(tl.float32) * (1.0 / N)
                if M > 0:
                    acc += from_norm[:, None] * xs[j].to(tl.float32)
                if MIXES:
                    for i in tl.static_range(N):
                        h = tl.load(row + N * READS + i * N + j, mask=live, other=0.0)
                        acc += h[:, None] * gs[i].to(tl.float32)
                else:
                    acc += gs[j].to(tl.float32)
                place = (t * N + j)[:, None] * C + c[None, :]
                rounded = acc.to(dx.dtype.element_ty)
                tl.store(dx + place, rounded, mask=keep)
                if DF:
                    dfv = add_written(
                        dfv, rounded.to(tl.float32), writer, writer_affine, t, live, j,
                        N, PARTS, MAGNITUDE, POST_EPS,
                    )  # fmt: skip
            if DF:
                tl.store(df + t[:, None] * C + c[None, :], dfv.to(df.dtype.element_ty), mask=keep)
        if DPHI or NORM:
            await_turn(turns + 1 + mine, piece)
            if DPHI:
                for j in tl.static_range(N):
                    _store_dphi(d_weight, totals[j], j * C + c, inside, N * C, M, MP, piece == 0)
            if NORM:
                if piece > 0:
                    norm_total += tl.load(norm_sums + c, mask=inside, other=0.0)
                if piece < RANGES - 1:
                    tl.store(norm_sums + c, norm_total, mask=inside)
                else:
                    tl.store(d_norm + c, norm_total.to(d_norm.dtype.element_ty), mask=inside)
            finish_turn(turns + 1 + mine)


@triton.jit
def _dphi_kernel(
    x, d, d_weight, turns, partial, d_affine, T, K, TS, SLICES, RANGES, P,
    N: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr, PAIR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_weight = d^T x where `_dx_kernel` has no registers for it, TS tokens a program; d_affine."""
    M: tl.constexpr = N * (PARTS % 2) + N * (PARTS // 2 % 2) + N * N * (PARTS // 4)
    ticket = tl.atomic_add(turns, 1, sem="relaxed")
    if ticket >= SLICES * RANGES:
        _reduce(partial, d_affine, ticket - SLICES * RANGES, P, N, NP, PARTS, BP)
    else:
        piece = ticket // SLICES
        mine = ticket % SLICES
        k = mine * BK + tl.arange(0, BK)
        m = tl.arange(0, MP)
        inside = k < K
        total = tl.zeros([BK, MP], tl.float32)
        for t0 in tl.range(piece * TS, min(T, piece * TS + TS), BT, num_stages=STAGES):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)
            live = t < T
            xv = tl.load(x + t[:, None] * K + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            dv = tl.load(d + t[:, None] * MP + m[None, :], mask=live[:, None] & (m < M)[None, :], other=0.0)
            total = add_product(total, tl.trans(xv), dv, PAIR, UPCAST)
        await_turn(turns + 1 + mine, piece)
        _store_dphi(d_weight, total, k, inside, K, M, MP, piece == 0)
        finish_turn(turns + 1 + mine)


def pre_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor | None,
    dl: Tensor,
    weight: Tensor,
    affine: Tensor,
    saved: Tensor,
    options: Options,
    *,
    writer: tuple[Tensor, Tensor] | None = None,
    f_bias: Tensor | None = None,
    dh_post: Tensor | None = None,
    norm: ReadNorm | None = None,
    norm_saved: Tensor | None = None,
    with_dphi: bool = True,
    handed: HandedBack | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x [T, n, C] in x's dtype, weight [M, n*C] and affine in fp32; df or None; and of the
    norm's weight [C] in its dtype, or None.

    Args:
        x, weight, affine, norm: as given to `pre_forward`; saved, norm_saved: as it returned.
        g: [T, n, C], gradient of x'; f: [T, C], the sub-layer's output; dl: [T, C], gradient of its input,
            which with a norm is the norm's output.
        writer: saved and affine of the connection that wrote x, of this form too, whose df [T, C] is made.
        f_bias: [C], what post_res added to f, if anything.
        dh_post: [T, n] fp32, where another pipeline stage has made it of f; f is then not read.
        with_dphi: else the gradient of weight is None.
        handed: what the layer input was read with in place of h_pre.
    """
    T, n, C = x.shape
    M, K, form, NP = weight.shape[0], n * C, options.form, power_of_two(n)
    MP, learned = mapping_block(M), form.parts.bit_count()
    f32 = dict(device=x.device, dtype=torch.float32)
    dx = torch.empty_like(x)
    d_weight, d_affine = torch.empty(M, K, **f32) if with_dphi else None, torch.empty_like(affine)
    d_norm = None if norm is None else torch.empty_like(norm.weight)
    if T == 0:
        d_weight, d_norm = (None if t is None else t.zero_() for t in (d_weight, d_norm))
        return dx, d_weight, d_affine.zero_(), None, d_norm
    norm_weight, _, zero_centered = norm or (None, 0.0, False)
    norm_sums = None if norm is None else torch.empty(C, **f32)
    with_dphi = with_dphi and M > 0
    is_pair = x.dtype == torch.bfloat16
    beside = with_dphi and is_pair and n < 8  # elsewhere the sums of dphi do not fit beside the rest
    reduces = beside or not with_dphi
    BT, BC = 16, 64 if n < 8 else 32
    if x.dtype == torch.float32 or (n == 8 and not is_pair):  # three times the operands of TF32 products
        BC //= 2
    slices = triton.cdiv(C, BC)
    # Two programs are resident on each of about 132 multiprocessors; without dphi there is no sum to share.
    ranges = max(1, min(264 // slices if beside else 16, triton.cdiv(T, 4 * BT)))
    BK = 64 if INTERPRETED else 128
    turns = torch.empty(1 + max(slices, triton.cdiv(K, BK)), device=x.device, dtype=torch.int32)
    d, mappings, partial = mapping_backward(
        x, g, f, dl, affine, saved, turns, options,
        f_bias=f_bias, dh_post=dh_post, norm=norm, norm_saved=norm_saved, handed=handed,
    )  # fmt: skip
    df = None if writer is None else torch.empty_like(dl)
    unused = (saved, affine)  # neither read nor, as dl, written
    sums = (turns, partial, d_affine)
    P, BP = partial.shape[0], 256 if n < 8 else 64
    _dx_kernel[(slices * ranges + learned * reduces,)](
        x, g, dl, weight, d, mappings, *(writer or unused), norm_weight, dx, dl if df is None else df,
        d_weight, norm_sums, d_norm, *sums, T, C, slices, ranges, P,
        n, NP, *form, MP, BT, BC, BP, 3 if n < 8 else 1, is_pair, beside, df is not None, INTERPRETED,
        reduces, norm is not None, zero_centered, num_warps=4,
    )  # fmt: skip
    if not reduces:
        turns.zero_()
        BT, slices = 16 if INTERPRETED else 64, triton.cdiv(K, BK)
        TS, ranges = split(T, 4, BT)
        _dphi_kernel[(slices * ranges + learned,)](
            x, d, d_weight, *sums, T, K, TS, slices, ranges, P,
            n, NP, form.parts, MP, BT, BK, BP, 3 if n < 8 else 2, is_pair, INTERPRETED,
            num_warps=4 if n < 8 else 8,
        )  # fmt: skip
    return dx, d_weight, d_affine, df, d_norm
