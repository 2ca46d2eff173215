"""post_res (Triton): x' = H_res x + h_post^T f, and the gradient of f.

Its backward writes df alone and hands the gradient of x' on untouched: the backward of `pre` reads it
once more and applies H_res^T together with everything else that x receives (`pre_backward`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.options import Form
from megatron_mhc.ops.triton.common import INTERPRETED, load_output, power_of_two

FULL = Form()


@triton.jit
def tile(T, C, BT: tl.constexpr, BC: tl.constexpr):
    """Tokens and channels of this program, and where they exist."""
    blocks = tl.cdiv(C, BC)
    t = (tl.program_id(0) // blocks * BT + tl.arange(0, BT)).to(tl.int64)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    live = t < T
    keep = live[:, None] & (c < C)[None, :]
    return t, c, live, keep


@triton.jit
def mixed(row, xs, f, live, i, N: tl.constexpr, PARTS: tl.constexpr):
    """Stream i of x', [BT, BC] fp32, of tiles x and f in fp32; row: the tokens' coefficients.

    With `fma` spelled out: of two products in a sum the compiler fuses one or the other, differently from
    kernel to kernel, and recompute needs the same bits from each.
    """
    WRITE_AT: tl.constexpr = N * (PARTS % 2)
    MIX_AT: tl.constexpr = WRITE_AT + N * (PARTS // 2 % 2)
    if PARTS // 4:
        if PARTS // 2 % 2:
            acc = tl.load(row + WRITE_AT + i, mask=live, other=0.0)[:, None] * f
        else:
            acc = f
        for j in tl.static_range(N):
            acc = tl.fma(tl.load(row + MIX_AT + i * N + j, mask=live, other=0.0)[:, None], xs[j], acc)
    elif PARTS // 2 % 2:
        acc = tl.fma(tl.load(row + WRITE_AT + i, mask=live, other=0.0)[:, None], f, xs[i])
    else:
        acc = xs[i] + f
    return acc


@triton.jit
def _post_res_kernel(
    x, f, f_bias, mappings, out, T, C,
    N: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j h_res[i, j] x_j + h_post_i (f + f_bias)."""
    M: tl.constexpr = N * (PARTS % 2) + N * (PARTS // 2 % 2) + N * N * (PARTS // 4)
    t, c, live, keep = tile(T, C, BT, BC)
    fv = load_output(f, f_bias, t[:, None] * C + c[None, :], c[None, :], C, keep)
    xs = ()
    for j in tl.static_range(N):
        xv = tl.load(x + (t * N + j)[:, None] * C + c[None, :], mask=keep, other=0.0)
        xs = xs + (xv.to(tl.float32),)
    row = mappings + t * M
    for i in tl.static_range(N):
        acc = mixed(row, xs, fv, live, i, N, PARTS)
        tl.store(out + (t * N + i)[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def add_written(
    total, g, saved, affine, t, live, i,
    N: tl.constexpr, PARTS: tl.constexpr, MAGNITUDE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """total + h_post_i g, of tiles [BT, BC] in fp32, h_post of the tokens t from what pre has saved."""
    WRITE_AT: tl.constexpr = N * (PARTS % 2)
    M: tl.constexpr = WRITE_AT + N * (PARTS // 2 % 2) + N * N * (PARTS // 4)
    if PARTS // 2 % 2:
        u = tl.load(saved + t * (M + 1) + WRITE_AT + i, mask=live, other=0.0)
        logit = u * tl.load(affine + M + PARTS % 2) + tl.load(affine + WRITE_AT + i)
        return total + (MAGNITUDE * tl.sigmoid(logit) + EPS)[:, None] * g
    else:
        return total + g


@triton.jit
def _post_backward_kernel(
    g, saved, affine, df, T, C,
    N: tl.constexpr, PARTS: tl.constexpr, MAGNITUDE: tl.constexpr, EPS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """df = sum_i h_post_i g_i."""
    t, c, live, keep = tile(T, C, BT, BC)
    acc = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(N):
        gv = tl.load(g + (t * N + i)[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32)
        acc = add_written(acc, gv, saved, affine, t, live, i, N, PARTS, MAGNITUDE, EPS)
    tl.store(df + t[:, None] * C + c[None, :], acc.to(df.dtype.element_ty), mask=keep)


def programs(T: int, C: int) -> tuple[tuple[int], tuple[int, int]]:
    """A grid of programs that need no others, and the tokens and channels of one: BT and BC of `tile`."""
    BT, BC = (8, power_of_two(C)) if INTERPRETED else (1, min(1024, power_of_two(C)))
    return (triton.cdiv(C, BC) * triton.cdiv(T, BT),), (BT, BC)


def streams_like(x: Tensor, f: Tensor) -> Tensor:
    """New streams [T, n, C] as x, or [s, b, n*C] where f is [s, b, C]; no view, which Megatron refuses."""
    return torch.empty_like(x) if f.dim() == 2 else x.new_empty((*f.shape[:2], x.shape[1] * x.shape[2]))


def post_res_forward(
    x: Tensor,
    f: Tensor,
    mappings: Tensor,
    f_bias: Tensor | None = None,
    out: Tensor | None = None,
    parts: int = FULL.parts,
) -> Tensor:
    """x' of x: [T, n, C], f: [T, C] and coefficients [T, M] fp32; in x's dtype.

    Where f is [s, b, C], x' is [s, b, n*C].

    Args:
        f_bias: [C] in f's dtype, which is added to f, with the bits of an addition of its own.
        out: where x' goes; by default new memory.
        parts: of the `Form`, those that the coefficients have.

    Source: arXiv 2512.24880 Eq. (3).
    """
    T, n, C = x.shape
    out = streams_like(x, f) if out is None else out
    if T:
        grid, sizes = programs(T, C)
        _post_res_kernel[grid](x, f, f_bias, mappings, out, T, C, n, parts, *sizes, num_warps=4)
    return out


def post_backward(g: Tensor, saved: Tensor, affine: Tensor, form: Form = FULL) -> Tensor:
    """df [T, C] of the gradient g: [T, n, C] of x' and what `pre_forward` saved under this form."""
    T, n, C = g.shape
    df = g.new_empty(T, C)
    if T:
        grid, sizes = programs(T, C)
        _post_backward_kernel[grid](g, saved, affine, df, T, C, n, *form, *sizes, num_warps=4)
    return df
