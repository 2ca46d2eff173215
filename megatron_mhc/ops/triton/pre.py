"""pre, forward (Triton): coefficients of the streams, and the layer input l = h_pre . x.

Shapes: T tokens, n streams, C channels, K = n*C, M mapping rows: n (pre) + n (post) + n*n (res), those of the
parts that are learned (`Form`). Tiles have NP streams, the next power of two.
Two launches: a projection that splits K over programs, x read once by the tensor cores, and an
aggregation that sums the parts in fixed order, runs Sinkhorn in registers and reads x again.

A folded norm needs |l|^2 before l is there: |l|^2 = sum_ij h_pre_i h_pre_j <x_i, x_j>, whose products the
projection sums too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.options import Handed, Options, ReadNorm
from megatron_mhc.ops.triton.common import (
    INTERPRETED,
    add_gram,
    add_product,
    load_norm_weight,
    mapping_block,
    part_rows,
    power_of_two,
    split,
)
from megatron_mhc.ops.triton.sinkhorn import sinkhorn_fwd, unfused_product


@triton.jit
def _project_kernel(
    x, weight, parts, T, K, KS,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PAIR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """parts[s, t, :M] = x[t, slice s] . weight[:, slice s]; parts[s, t, M] = the slice's sum of squares."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    piece = tl.program_id(1)
    m = tl.arange(0, MP)
    live = t < T
    acc = tl.zeros([BT, MP], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for k0 in tl.range(piece * KS, min(K, piece * KS + KS), BK):
        k = k0 + tl.arange(0, BK)
        inside = k < K
        xv = tl.load(x + t[:, None] * K + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        wv = tl.load(weight + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
        xf = xv.to(tl.float32)
        squares += tl.sum(xf * xf, axis=1)
        acc = add_product(acc, xv, wv, PAIR, UPCAST)
    row = parts + (piece * T + t) * (M + 1)
    tl.store(row[:, None] + m[None, :], acc, mask=live[:, None] & (m < M)[None, :])
    tl.store(row + M, squares, mask=live)


@triton.jit
def _project_gram_kernel(
    x, weight, parts, T, C, CS,
    N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    PAIR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """parts[s, t, :M] = x[t, :, slice s] . weight[:, slice s]; parts[s, t, M:] = the slice's <x_i, x_j>."""
    GRAM: tl.constexpr = N * (N + 1) // 2
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    piece = tl.program_id(1)
    m = tl.arange(0, MP)
    live = t < T
    acc = tl.zeros([BT, MP], tl.float32)
    grams = ()
    for _ in tl.static_range(GRAM):
        grams = grams + (tl.zeros([BT], tl.float32),)
    for c0 in tl.range(piece * CS, min(C, piece * CS + CS), BC):
        c = c0 + tl.arange(0, BC)
        inside = c < C
        xs = ()
        for j in tl.static_range(N):
            rows = x + (t * N + j)[:, None] * C + c[None, :]
            xv = tl.load(rows, mask=live[:, None] & inside[None, :], other=0.0)
            if M > 0:
                columns = weight + m[None, :] * (N * C) + j * C + c[:, None]
                wv = tl.load(columns, mask=(m < M)[None, :] & inside[:, None], other=0.0)
                acc = add_product(acc, xv, wv, PAIR, UPCAST)
            xs = xs + (xv.to(tl.float32),)
        grams = add_gram(grams, xs, N)
    row = parts + (piece * T + t) * (M + GRAM)
    tl.store(row[:, None] + m[None, :], acc, mask=live[:, None] & (m < M)[None, :])
    for k in tl.static_range(GRAM):
        tl.store(row + M + k, grams[k], mask=live)


@triton.jit
def _aggregate_kernel(
    x, parts, affine, norm_weight, given, handed_on, out, saved, mappings, norm_saved, T, C, PIECES, eps,
    read_norm_eps,
    N: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr, MAGNITUDE: tl.constexpr,
    POST_EPS: tl.constexpr, ITERATIONS: tl.constexpr, V4: tl.constexpr, NORM: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Finish the projection, keep u = projection / r and 1 / r, write the coefficients and h_pre . x.

    With NORM, write its norm in its place; keep <x_i, l> and 1 / rms(l). given: [T, N], None or what to read
    with in place of h_pre, which goes to handed_on [T, N] too. out: None if the layer input is there.
    """
    READS: tl.constexpr = PARTS % 2
    WRITES: tl.constexpr = PARTS // 2 % 2
    MIXES: tl.constexpr = PARTS // 4
    WRITE_AT: tl.constexpr = N * READS
    MIX_AT: tl.constexpr = WRITE_AT + N * WRITES
    M: tl.constexpr = MIX_AT + N * N * MIXES
    R: tl.constexpr = M + (N * (N + 1) // 2 if NORM else 1)
    # Last tokens first: the projection has just read those, so part of x is still in L2.
    t = ((tl.num_programs(0) - 1 - tl.program_id(0)) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < T
    i = tl.arange(0, NP)
    ij = i[:, None] * N + i[None, :]
    real = i < N
    square = real[:, None] & real[None, :]
    keep = live[:, None]
    keep2 = live[:, None, None]
    if N != NP:
        keep = keep & real[None, :]
        keep2 = keep2 & square[None, :, :]
    squares = tl.zeros([BT], tl.float32)
    pre = tl.zeros([BT, NP], tl.float32)
    post = tl.zeros([BT, NP], tl.float32)
    res = tl.zeros([BT, NP, NP], tl.float32)
    if NORM:
        low, high = tl.minimum(i[:, None], i[None, :]), tl.maximum(i[:, None], i[None, :])
        pair = low * (2 * N - low + 1) // 2 + high - low
        gram = tl.zeros([BT, NP, NP], tl.float32)
    if M > 0 or NORM:
        for piece in tl.range(PIECES):
            row = parts + (piece * T + t) * R
            if NORM:
                gram += tl.load(row[:, None, None] + M + pair[None, :, :], mask=keep2, other=0.0)
            else:
                squares += tl.load(row + M, mask=live, other=0.0)
            if READS:
                pre += tl.load(row[:, None] + i[None, :], mask=keep, other=0.0)
            if WRITES:
                post += tl.load(row[:, None] + WRITE_AT + i[None, :], mask=keep, other=0.0)
            if MIXES:
                res += tl.load(row[:, None, None] + MIX_AT + ij[None, :, :], mask=keep2, other=0.0)
    if NORM:
        squares = tl.sum(tl.sum(tl.where((i[:, None] == i[None, :])[None, :, :], gram, 0.0), axis=2), axis=1)
    if M > 0:
        inverse_rms = tl.rsqrt(squares / (N * C) + eps)
        tl.store(saved + t * (M + 1) + M, inverse_rms, mask=live)
    row = saved + t * (M + 1)
    out_row = mappings + t * M
    if READS:
        pre = pre * inverse_rms[:, None]
        tl.store(row[:, None] + i[None, :], pre, mask=keep)
        h_pre = tl.sigmoid(pre * tl.load(affine + M) + tl.load(affine + i, mask=real, other=0.0)[None, :])
        if V4:
            h_pre += 1e-6
        tl.store(out_row[:, None] + i[None, :], h_pre, mask=keep)
        if given is not None:
            tl.store(handed_on + t[:, None] * N + i[None, :], h_pre, mask=keep)
            h_pre = tl.load(given + t[:, None] * N + i[None, :], mask=keep, other=0.0)
    else:
        h_pre = tl.full([BT, NP], 1.0 / N, tl.float32)
    if WRITES:
        post = post * inverse_rms[:, None]
        tl.store(row[:, None] + WRITE_AT + i[None, :], post, mask=keep)
        bias = tl.load(affine + WRITE_AT + i, mask=real, other=0.0)[None, :]
        h_post = MAGNITUDE * tl.sigmoid(post * tl.load(affine + M + READS) + bias) + POST_EPS
        tl.store(out_row[:, None] + WRITE_AT + i[None, :], h_post, mask=keep)
    if MIXES:
        res = res * inverse_rms[:, None, None]
        tl.store(row[:, None, None] + MIX_AT + ij[None, :, :], res, mask=keep2)
        bias = tl.load(affine + MIX_AT + ij, mask=square, other=0.0)[None, :, :]
        h_res = sinkhorn_fwd(res * tl.load(affine + M + READS + WRITES) + bias, N, NP, ITERATIONS, V4)
        if V4:  # comb is H_res transposed
            ij = i[:, None] + i[None, :] * N
        tl.store(out_row[:, None, None] + MIX_AT + ij[None, :, :], h_res, mask=keep2)

    read = h_pre
    if NORM:
        with_l = tl.sum(unfused_product(gram, tl.broadcast_to(h_pre[:, None, :], [BT, NP, NP])), axis=2)
        of_l = tl.sum(unfused_product(with_l, h_pre), axis=1)
        inverse_rms = tl.rsqrt(tl.where(of_l < 0.0, 0.0, of_l) / C + read_norm_eps)
        row = norm_saved + t * (N + 1)
        if READS:
            tl.store(row[:, None] + i[None, :], with_l, mask=keep)
        tl.store(row + N, inverse_rms, mask=live)
        # Of a value that two layouts need, Triton may make a copy for each, whose sums go in another order.
        # `replay` reads what is stored: this pass does too.
        tl.debug_barrier()
        inverse_rms = tl.load(row + N, mask=live, other=0.0)
        if READS:
            if given is None:
                read = tl.load(out_row[:, None] + i[None, :], mask=keep, other=0.0)
            read *= inverse_rms[:, None]

    if out is not None:
        for c0 in tl.range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            here = live[:, None] & (c < C)[None, :]
            acc = tl.zeros([BT, BC], tl.float32)
            for j in tl.static_range(N):
                xv = tl.load(x + (t * N + j)[:, None] * C + c[None, :], mask=here, other=0.0)
                if READS:
                    h = tl.sum(tl.where(i[None, :] == j, read, 0.0), axis=1)
                    acc += h[:, None] * xv.to(tl.float32)
                else:
                    acc += xv.to(tl.float32)
            if READS == 0:
                if NORM:
                    acc *= (inverse_rms * (1.0 / N))[:, None]
                else:
                    acc *= 1.0 / N
            if NORM:
                acc *= load_norm_weight(norm_weight, c, C, ZERO_CENTERED)[None, :]
            tl.store(out + t[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=here)


def _project(x: Tensor, weight: Tensor, gram: bool) -> Tensor:
    """The projection of x and the sums beside it in parts, [pieces, T, part_rows] fp32."""
    T, n, C = x.shape
    M, K = weight.shape[0], n * C
    BT, BK = (16, 64) if INTERPRETED else (128, 64)
    if n == 8:
        BT = min(BT, 64)  # four times the accumulator columns
    # Enough programs for every multiprocessor, however few tokens there are.
    most = max(4, min(16, 1024 * 128 // (T * 4)))
    if gram:
        BC = 16 if INTERPRETED or n == 8 else 32  # of all streams
        size, pieces = split(C, most, BC)
    else:
        size, pieces = split(K, most, BK)
    parts = torch.empty(pieces, T, part_rows(M, n, gram), device=x.device, dtype=torch.float32)
    if gram:
        _project_gram_kernel[(triton.cdiv(T, BT), pieces)](
            x, weight, parts, T, C, size, n, M, mapping_block(M), BT, BC, x.dtype == torch.bfloat16,
            INTERPRETED, num_warps=8, num_stages=3 if n < 8 else 2,
        )  # fmt: skip
        return parts
    _project_kernel[(triton.cdiv(T, BT), pieces)](
        x, weight, parts, T, K, size, M, mapping_block(M), BT, BK, x.dtype == torch.bfloat16, INTERPRETED,
        num_warps=8, num_stages=4 if n < 8 else 2,
    )  # fmt: skip
    return parts


def pre_forward(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    options: Options,
    parts: Tensor | None = None,
    norm: ReadNorm | None = None,
    handed: Handed | None = None,
    layer_input: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute coefficients and layer input.

    Args:
        x: [T, n, C] bf16, fp16 or fp32, contiguous; C a multiple of 16.
        weight: [M, n*C] fp32.
        affine: [M+3] fp32, the biases, then alpha_pre, alpha_post and alpha_res; those of learned parts.
        parts: [pieces, T, part_rows] fp32, the projection in parts, where x's writer has made it.
        norm: of the layer input l, whose output is written in its place.
        handed: what to read with in place of h_pre, which is learned then.
        layer_input: l, where x's writer has made that.

    Returns:
        layer input [T, C] in x's dtype; `saved` [T, M+1] fp32 (u and 1/r, for backward), not written where M
        is 0; the coefficients [T, M] fp32 (h_pre, h_post, h_res row-major); with a norm `norm_saved`
        [T, n+1] fp32, <x_i, l>, if h_pre is learned, and 1/rms(l).

    Source: arXiv 2512.24880 Eqs. (14)-(19).
    """
    T, n, C = x.shape
    M, form = weight.shape[0], options.form
    f32 = dict(device=x.device, dtype=torch.float32)
    out = x.new_empty(T, C) if layer_input is None else layer_input
    saved, mappings = torch.empty(T, M + 1, **f32), torch.empty(T, M, **f32)
    norm_saved = None if norm is None else torch.empty(T, n + 1, **f32)
    if T == 0:
        return out, saved, mappings, norm_saved
    if parts is None and (M or norm is not None):
        parts = _project(x, weight, norm is not None)
    norm_weight, read_norm_eps, zero_centered = norm or (None, 0.0, False)
    given, handed_on = handed or (None, None)
    BT, BC = (8, power_of_two(C)) if INTERPRETED else (2, min(512, power_of_two(C)))
    _aggregate_kernel[(triton.cdiv(T, BT),)](
        x, parts, affine, norm_weight, given, handed_on, out if layer_input is None else None, saved,
        mappings, norm_saved, T, C, 0 if parts is None else parts.shape[0], options.norm_eps, read_norm_eps,
        n, power_of_two(n), *form, options.iterations, options.deepseek_v4, norm is not None, zero_centered,
        BT, BC, num_warps=2, num_stages=2,
    )  # fmt: skip
    return out, saved, mappings, norm_saved
