"""The two ends of a split pipeline boundary (Triton); u = one bf16 stream of all tokens, n = 4.

    mix             u = H_res x                                   8 u    on the stage that sends
    write           x' = u + h_post^T f                           9 u    on the stage that receives
    write_backward  df = h_post g and dh_post = g f in one read   6 u    there too

What else the sending stage needs is `pre_forward`, and `pre_backward` with the dh_post that came.
f, h_post and their gradients may be rows of a longer row: of the packed message that carries both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.options import MIXES
from megatron_mhc.ops.triton.common import INTERPRETED, power_of_two
from megatron_mhc.ops.triton.mapping_backward import VECTOR
from megatron_mhc.ops.triton.post_res import FULL, programs, tile


@triton.jit
def _mix_kernel(
    x, mappings, out, T, C, N: tl.constexpr, MIX_AT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """out_i = sum_j h_res[i, j] x_j."""
    M: tl.constexpr = MIX_AT + N * N
    t, c, live, keep = tile(T, C, BT, BC)
    xs = ()
    for j in tl.static_range(N):
        xv = tl.load(x + (t * N + j)[:, None] * C + c[None, :], mask=keep, other=0.0)
        xs = xs + (xv.to(tl.float32),)
    row = mappings + t * M + MIX_AT
    for i in tl.static_range(N):
        acc = tl.zeros([BT, BC], tl.float32)
        for j in tl.static_range(N):
            acc = tl.fma(tl.load(row + i * N + j, mask=live, other=0.0)[:, None], xs[j], acc)
        tl.store(out + (t * N + i)[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _write_kernel(
    u, f, h_post, out, T, C, H_ROW,
    F_MORE: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out_i = u_i + h_post_i f; a row of f is C + F_MORE long, one of h_post H_ROW."""
    t, c, live, keep = tile(T, C, BT, BC)
    # F_MORE a constant, so that the compiler sees how far the rows are aligned.
    fv = tl.load(f + t[:, None] * (C + F_MORE) + c[None, :], mask=keep, other=0.0).to(tl.float32)
    us = ()
    for i in tl.static_range(N):
        us = us + (tl.load(u + (t * N + i)[:, None] * C + c[None, :], mask=keep, other=0.0),)
    for i in tl.static_range(N):
        h = tl.load(h_post + t * H_ROW + i, mask=live, other=0.0)
        acc = tl.fma(h[:, None], fv, us[i].to(tl.float32))
        tl.store(out + (t * N + i)[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _write_backward_kernel(
    g, f, h_post, df, dh_post, T, C, H_ROW, DH_ROW,
    F_MORE: tl.constexpr, DF_MORE: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """df = sum_i h_post_i g_i and dh_post_i = g_i . f; rows as in `_write_kernel`."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = t < T
    t3 = t[:, None, None]
    c3 = tl.arange(0, G)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    hs = ()
    dots = ()  # [BT, G] each: g_i . f
    for i in tl.static_range(N):
        hs = hs + (tl.load(h_post + t * H_ROW + i, mask=live, other=0.0)[:, None, None],)
        dots = dots + (tl.zeros([BT, G], tl.float32),)
    for c0 in tl.range(0, C, G * VECTOR):
        c = c0 + c3
        keep = live[:, None, None] & (c < C)
        fv = tl.load(f + t3 * (C + F_MORE) + c, mask=keep, other=0.0).to(tl.float32)
        gs = ()
        for i in tl.static_range(N):
            gs = gs + (tl.load(g + (t3 * N + i) * C + c, mask=keep, other=0.0).to(tl.float32),)
        acc = tl.zeros([BT, G, VECTOR], tl.float32)
        more = ()
        for i in tl.static_range(N):
            acc += hs[i] * gs[i]
            more = more + (dots[i] + tl.sum(gs[i] * fv, axis=2),)
        dots = more
        tl.store(df + t3 * (C + DF_MORE) + c, acc.to(df.dtype.element_ty), mask=keep)
    for i in tl.static_range(N):
        tl.store(dh_post + t * DH_ROW + i, tl.sum(dots[i], axis=1), mask=live)


def mix(x: Tensor, mappings: Tensor, parts: int = FULL.parts) -> Tensor:
    """u = H_res x of x: [T, n, C] and coefficients [T, M] fp32, those of `parts`; in x's dtype.

    Source: arXiv 2512.24880 Eq. (3), the first of its two terms.
    """
    T, n, C = x.shape
    if not parts & MIXES:
        return x.clone()  # u is sent, and kept by others than x
    u = torch.empty_like(x)
    if T:
        grid, sizes = programs(T, C)
        _mix_kernel[grid](x, mappings, u, T, C, n, mappings.shape[1] - n * n, *sizes, num_warps=4)
    return u


def write(u: Tensor, f: Tensor, h_post: Tensor) -> Tensor:
    """x' = u + h_post^T f of u: [T, n, C], f: [T, C] in u's dtype and h_post: [T, n] fp32; in u's dtype.

    Source: arXiv 2512.24880 Eq. (3), its second term added to the first.
    """
    T, n, C = u.shape
    out = torch.empty_like(u)
    if T:
        grid, sizes = programs(T, C)
        rows = (h_post.stride(0), f.stride(0) - C)
        _write_kernel[grid](u, f, h_post, out, T, C, *rows, n, *sizes, num_warps=4)
    return out


def write_backward(g: Tensor, f: Tensor, h_post: Tensor, df: Tensor, dh_post: Tensor) -> None:
    """Fill df: [T, C] in f's dtype and dh_post: [T, n] fp32 from g: [T, n, C], the gradient of `write`'s x'.

    Args:
        f, h_post: as given to `write`.

    Source: arXiv 2512.24880 Eq. (3).
    """
    T, n, C = g.shape
    if T:
        BT, G = (8, power_of_two(C) // 8) if INTERPRETED else (2, min(32, power_of_two(C) // 8))
        rows = (h_post.stride(0), dh_post.stride(0), f.stride(0) - C, df.stride(0) - C)
        _write_backward_kernel[(triton.cdiv(T, BT),)](
            g, f, h_post, df, dh_post, T, C, *rows, n, BT, G, num_warps=2 if n < 8 else 4
        )
