"""pre, backward (Triton): everything that the streams and the mapping parameters receive.

Four launches. `_dots_kernel` reads x, g, f, dl once for the products over C that the mappings' gradients
need and turns them, in registers, into gradients per token. `_dx_kernel` reads x, g, dl and writes dx,
complete. `_dphi_kernel` reads x once more, by tensor cores. `_reduce_kernel` sums biases and alphas. No
atomics: partial sums lie side by side and are added in fixed order, so results repeat bit for bit.

Shapes as in `pre`; g [T, n, C] is the gradient of x' as it came, dl [T, C] that of the layer input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.launch import INTERPRETED, mapping_block, mapping_rows, power_of_two, split
from megatron_mhc.ops.sinkhorn import sinkhorn_bwd

VECTOR = tl.constexpr(8)  # channels a thread sums before anything is exchanged


@triton.jit
def _store_pair(pointer, value, HALF: tl.constexpr, mask):
    high = value.to(tl.bfloat16)
    tl.store(pointer, high, mask=mask)
    tl.store(pointer + HALF, (value - high.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def _dots_kernel(
    x, g, f, dl, saved, bias, alpha_pre, alpha_post, alpha_res, d, pair, mappings, partial, T, C,
    N: tl.constexpr, MP: tl.constexpr, ITERATIONS: tl.constexpr, V4: tl.constexpr,
    BT: tl.constexpr, G: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Gradients per token.

    d [T, MP]: of the raw projection; column M holds the factor of x from the norm. pair [T, 2, MP]: d as
    bf16 high and low halves. mappings [T, N + N*N]: h_pre and h_res, replayed. partial [programs, 2, M]:
    sums over this program's tokens of dlogit and of dlogit * u.
    """
    M: tl.constexpr = 2 * N + N * N
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < T
    t3 = t[:, None, None]
    c3 = tl.arange(0, G)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    acc = ()  # [BT, G] each: dl.x_j, then g_i.f, then g_i.x_j
    for _ in tl.static_range(M):
        acc = acc + (tl.zeros([BT, G], tl.float32),)
    for c0 in tl.range(0, C, G * VECTOR):
        c = c0 + c3
        keep = live[:, None, None] & (c < C)
        fv = tl.load(f + t3 * C + c, mask=keep, other=0.0).to(tl.float32)
        dv = tl.load(dl + t3 * C + c, mask=keep, other=0.0).to(tl.float32)
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
            with_f = with_f + (acc[N + i] + tl.sum(gv * fv, axis=2),)
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

    ij = n1[:, None] * N + n1[None, :]
    row = saved + t * (M + 1)
    u_pre = tl.load(row[:, None] + n1[None, :], mask=live[:, None], other=0.0)
    u_post = tl.load(row[:, None] + N + n1[None, :], mask=live[:, None], other=0.0)
    u_res = tl.load(row[:, None, None] + 2 * N + ij[None, :, :], mask=live[:, None, None], other=0.0)
    inverse_rms = tl.load(row + M, mask=live, other=0.0)
    a_pre, a_post, a_res = tl.load(alpha_pre), tl.load(alpha_post), tl.load(alpha_res)
    s_pre = tl.sigmoid(u_pre * a_pre + tl.load(bias + n1)[None, :])
    s_post = tl.sigmoid(u_post * a_post + tl.load(bias + N + n1)[None, :])
    logits = u_res * a_res + tl.load(bias + 2 * N + ij)[None, :, :]
    h_res, d_res = sinkhorn_bwd(logits, d_res, ITERATIONS, V4)
    d_pre = d_pre * s_pre * (1 - s_pre)
    d_post = d_post * 2 * s_post * (1 - s_post)

    # Rows behind T hold zeros: everything they were made of was loaded as zero.
    out = partial + tl.program_id(0).to(tl.int64) * (2 * M)
    tl.store(out + n1, tl.sum(d_pre, axis=0))
    tl.store(out + N + n1, tl.sum(d_post, axis=0))
    tl.store(out + 2 * N + ij, tl.sum(d_res, axis=0))
    tl.store(out + M + n1, tl.sum(d_pre * u_pre, axis=0))
    tl.store(out + M + N + n1, tl.sum(d_post * u_post, axis=0))
    tl.store(out + M + 2 * N + ij, tl.sum(d_res * u_res, axis=0))

    # From here of u = projection / r: d/dx of 1/r = -x / (n C r^3) gives the factor in column M.
    d_pre, d_post, d_res = d_pre * a_pre, d_post * a_post, d_res * a_res
    inner = tl.sum(d_pre * u_pre, axis=1) + tl.sum(d_post * u_post, axis=1)
    inner += tl.sum(tl.sum(d_res * u_res, axis=2), axis=1)
    d_pre, d_post = d_pre * inverse_rms[:, None], d_post * inverse_rms[:, None]
    d_res = d_res * inverse_rms[:, None, None]
    row = d + t * MP
    tl.store(row[:, None] + n1[None, :], d_pre, mask=live[:, None])
    tl.store(row[:, None] + N + n1[None, :], d_post, mask=live[:, None])
    tl.store(row[:, None, None] + 2 * N + ij[None, :, :], d_res, mask=live[:, None, None])
    tl.store(row + M, -inner * inverse_rms * inverse_rms / (N * C), mask=live)
    if PAIR:
        row = pair + t * (2 * MP)
        _store_pair(row[:, None] + n1[None, :], d_pre, MP, live[:, None])
        _store_pair(row[:, None] + N + n1[None, :], d_post, MP, live[:, None])
        _store_pair(row[:, None, None] + 2 * N + ij[None, :, :], d_res, MP, live[:, None, None])
    row = mappings + t * (N + N * N)
    h_pre = s_pre
    if V4:
        h_pre = s_pre + 1e-6
        ij = n1[:, None] + n1[None, :] * N
    tl.store(row[:, None] + n1[None, :], h_pre, mask=live[:, None])
    tl.store(row[:, None, None] + N + ij[None, :, :], h_res, mask=live[:, None, None])


@triton.jit
def _dx_kernel(
    x, g, dl, weight, d, mappings, dx, T, C, TS,
    N: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx_j = sum_i h_res[i, j] g_i + h_pre_j dl + (d . weight)_j + d[M] x_j, for TS tokens of BC channels."""
    M: tl.constexpr = 2 * N + N * N
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    m = tl.arange(0, MP)
    inside = c < C
    weights = ()
    for j in tl.static_range(N):
        rows = weight + m[:, None] * (N * C) + j * C + c[None, :]
        weights = weights + (tl.load(rows, mask=(m < M)[:, None] & inside[None, :], other=0.0),)
    start = tl.program_id(1) * TS
    for t0 in tl.range(start, min(T, start + TS), BT, num_stages=STAGES):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        live = t < T
        keep = live[:, None] & inside[None, :]
        dv = tl.load(d + t[:, None] * MP + m[None, :], mask=live[:, None] & (m < M)[None, :], other=0.0)
        from_norm = tl.load(d + t * MP + M, mask=live, other=0.0)
        dlv = tl.load(dl + t[:, None] * C + c[None, :], mask=keep, other=0.0)
        gs = ()
        xs = ()
        for i in tl.static_range(N):
            place = (t * N + i)[:, None] * C + c[None, :]
            gs = gs + (tl.load(g + place, mask=keep, other=0.0),)
            xs = xs + (tl.load(x + place, mask=keep, other=0.0),)
        row = mappings + t * (N + N * N)
        for j in tl.static_range(N):
            acc = tl.dot(dv, weights[j], input_precision="ieee" if UPCAST else "tf32")
            acc += tl.load(row + j, mask=live, other=0.0)[:, None] * dlv.to(tl.float32)
            acc += from_norm[:, None] * xs[j].to(tl.float32)
            for i in tl.static_range(N):
                acc += tl.load(row + N + i * N + j, mask=live, other=0.0)[:, None] * gs[i].to(tl.float32)
            place = (t * N + j)[:, None] * C + c[None, :]
            tl.store(dx + place, acc.to(dx.dtype.element_ty), mask=keep)


@triton.jit
def _dphi_kernel(
    x, d, pair, parts, T, K, TS,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PAIR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """parts[s] = d^T x over the tokens of range s."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    piece = tl.program_id(1)
    m = tl.arange(0, MP)
    inside = k < K
    acc = tl.zeros([BK, MP], tl.float32)
    for t0 in tl.range(piece * TS, min(T, piece * TS + TS), BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)
        live = t < T
        xv = tl.load(x + t[:, None] * K + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if PAIR:
            # Columns behind M are never written and never stored: whatever they hold stays there.
            row = pair + t[:, None] * (2 * MP) + m[None, :]
            high = tl.load(row, mask=live[:, None], other=0.0)
            low = tl.load(row + MP, mask=live[:, None], other=0.0)
            if UPCAST:
                xt = tl.trans(xv.to(tl.float32))
                acc += tl.dot(xt, high.to(tl.float32)) + tl.dot(xt, low.to(tl.float32))
            else:
                acc = tl.dot(tl.trans(xv), high, acc)
                acc = tl.dot(tl.trans(xv), low, acc)
        else:
            dv = tl.load(d + t[:, None] * MP + m[None, :], mask=live[:, None] & (m < M)[None, :], other=0.0)
            acc = tl.dot(tl.trans(xv.to(tl.float32)), dv, acc, input_precision="ieee" if UPCAST else "tf32x3")
    place = parts + (piece * M + m)[None, :].to(tl.int64) * K + k[:, None]
    tl.store(place, acc, mask=(m < M)[None, :] & inside[:, None])


@triton.jit
def _reduce_kernel(partial, d_bias, d_alphas, P, N: tl.constexpr, BP: tl.constexpr):
    """Sum the parts of dbias and dalpha; one program each for pre, post and res."""
    M: tl.constexpr = 2 * N + N * N
    part = tl.program_id(0)
    m = tl.arange(0, N * N)
    columns = tl.where(part == 2, N * N, N)
    place = part * N + m
    p = tl.arange(0, BP)
    logits = tl.zeros([BP, N * N], tl.float32)
    gates = tl.zeros([BP, N * N], tl.float32)
    for p0 in tl.range(0, P, BP):
        keep = (p0 + p < P)[:, None] & (m < columns)[None, :]
        row = partial + (p0 + p)[:, None] * (2 * M) + place[None, :]
        logits += tl.load(row, mask=keep, other=0.0)
        gates += tl.load(row + M, mask=keep, other=0.0)
    tl.store(d_bias + place, tl.sum(logits, axis=0), mask=m < columns)
    tl.store(d_alphas + part, tl.sum(tl.sum(gates, axis=0), axis=0))


def pre_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor,
    dl: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    saved: Tensor,
    *,
    iterations: int,
    deepseek_v4: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, n, C] in x's dtype, weight [M, n*C], bias [M] and alphas [3] in fp32.

    Args:
        x, weight, bias, alphas: as given to `pre_forward`; saved: as it returned.
        g: [T, n, C], gradient of x'; f: [T, C], the sub-layer's output; dl: [T, C], gradient of its input.
    """
    T, n, C = x.shape
    M, MP, K = mapping_rows(n), mapping_block(n), n * C
    f32 = dict(device=x.device, dtype=torch.float32)
    dx = torch.empty_like(x)
    d_bias, d_alphas = torch.empty(M, **f32), torch.empty(3, **f32)
    if T == 0:
        return dx, torch.zeros_like(weight), d_bias.zero_(), d_alphas.zero_()
    is_pair = x.dtype == torch.bfloat16

    BT, G = (8, power_of_two(C) // 8) if INTERPRETED else (4 if n < 8 else 2, min(32, power_of_two(C) // 8))
    programs = triton.cdiv(T, BT)
    d, mappings = torch.empty(T, MP, **f32), torch.empty(T, n + n * n, **f32)
    pair = torch.empty(T, 2, MP, device=x.device, dtype=torch.bfloat16) if is_pair else d
    partial = torch.empty(programs, 2, M, **f32)
    _dots_kernel[(programs,)](
        x, g, f, dl, saved, bias, *alphas, d, pair, mappings, partial, T, C,
        n, MP, iterations, deepseek_v4, BT, G, is_pair, num_warps=4,
    )  # fmt: skip

    BT, BC = (16, 64) if n < 8 else (16, 32)
    TS, pieces = split(T, 16, BT)
    _dx_kernel[(triton.cdiv(C, BC), pieces)](
        x, g, dl, weight, d, mappings, dx, T, C, TS, n, MP, BT, BC, 3 if n < 8 else 1, INTERPRETED,
        num_warps=4,
    )  # fmt: skip

    BT, BK = (16, 64) if INTERPRETED else (64, 128)
    TS, pieces = split(T, 4, BT)
    parts = torch.empty(pieces, M, K, **f32)
    _dphi_kernel[(triton.cdiv(K, BK), pieces)](
        x, d, pair, parts, T, K, TS, M, MP, BT, BK, is_pair, INTERPRETED,
        num_warps=4 if n < 8 else 8, num_stages=4 if n < 8 else 2,
    )  # fmt: skip
    _reduce_kernel[(3,)](partial, d_bias, d_alphas, programs, n, 256 if n < 8 else 64, num_warps=8)
    return dx, parts.sum(0) if pieces > 1 else parts[0], d_bias, d_alphas
