"""post_res of one connection and the projection of the next in one pass (Triton, bf16 streams).

x' is projected from the registers it is written from, as the bf16 values that are stored, so the next
connection's pre reads it once, for the layer input, and not twice; or not at all, where the layer input is
read with the weights of this connection (--mhc-read previous), and is made here too.

Shapes as in `pre`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.triton.common import (
    INTERPRETED,
    add_gram,
    add_product,
    load_output,
    mapping_block,
    part_rows,
    split,
)
from megatron_mhc.ops.triton.post_res import FULL, streams_like


@triton.jit
def _boundary_kernel(
    x, f, f_bias, mappings, weight, out, parts, read, T, C, CS,
    N: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, STAGES: tl.constexpr, GRAM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j h_res[i, j] x_j + h_post_i (f + f_bias) on one slice of CS channels;
    parts[s, t, :M] = the slice's out . weight^T over all streams; parts[s, t, M] = its sum of squares,
    or with GRAM parts[s, t, M:] = its <out_i, out_j>. read: None, or [T, C] for sum_i h_pre_i out_i.

    PARTS is of these coefficients, M the next connection's.
    """
    WRITE_AT: tl.constexpr = N * (PARTS % 2)
    MIX_AT: tl.constexpr = WRITE_AT + N * (PARTS // 2 % 2)
    PAIRS: tl.constexpr = N * (N + 1) // 2
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    piece = tl.program_id(1)
    m = tl.arange(0, MP)
    live = t < T
    row = mappings + t * (MIX_AT + N * N * (PARTS // 4))
    post = ()
    res = ()
    for i in tl.static_range(N):
        if PARTS // 2 % 2:
            post = post + (tl.load(row + WRITE_AT + i, mask=live, other=0.0),)
        if PARTS // 4:
            for j in tl.static_range(N):
                res = res + (tl.load(row + MIX_AT + i * N + j, mask=live, other=0.0),)
    total = tl.zeros([BT, MP], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    grams = ()
    for _ in tl.static_range(PAIRS):
        grams = grams + (tl.zeros([BT], tl.float32),)
    for c0 in tl.range(piece * CS, min(C, piece * CS + CS), BC, num_stages=STAGES):
        c = c0 + tl.arange(0, BC)
        inside = c < C
        keep = live[:, None] & inside[None, :]
        fv = load_output(f, f_bias, t[:, None] * C + c[None, :], c[None, :], C, keep)
        xs = ()
        ws = ()
        for j in tl.static_range(N):
            xs = xs + (tl.load(x + (t * N + j)[:, None] * C + c[None, :], mask=keep, other=0.0),)
            rows = weight + m[None, :] * (N * C) + j * C + c[:, None]
            ws = ws + (tl.load(rows, mask=(m < M)[None, :] & inside[:, None], other=0.0),)
        written = ()
        layer_input = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(N):
            if PARTS // 4:  # as in post_res.mixed
                if PARTS // 2 % 2:
                    acc = post[i][:, None] * fv
                else:
                    acc = fv
                for j in tl.static_range(N):
                    acc = tl.fma(res[i * N + j][:, None], xs[j].to(tl.float32), acc)
            elif PARTS // 2 % 2:
                acc = tl.fma(post[i][:, None], fv, xs[i].to(tl.float32))
            else:
                acc = xs[i].to(tl.float32) + fv
            rounded = acc.to(out.dtype.element_ty)
            if not UPCAST:
                # Opaque to the compiler, which would else compute all of the above a second time, in the
                # layout of the product below: twice the registers.
                rounded = tl.inline_asm_elementwise(
                    "mov.b32 $0, $1;", "=r,r", [rounded], dtype=tl.bfloat16, is_pure=False, pack=2
                )
            tl.store(out + (t * N + i)[:, None] * C + c[None, :], rounded, mask=keep)
            exact = rounded.to(tl.float32)
            if read is not None:
                layer_input = tl.fma(tl.load(row + i, mask=live, other=0.0)[:, None], exact, layer_input)
            if GRAM:
                written = written + (exact,)
            else:
                squares += exact * exact
            total = add_product(total, rounded, ws[i], True, UPCAST)
        if GRAM:
            grams = add_gram(grams, written, N)
        if read is not None:
            tl.store(read + t[:, None] * C + c[None, :], layer_input.to(read.dtype.element_ty), mask=keep)
    place = parts + (piece * T + t) * (M + (PAIRS if GRAM else 1))
    tl.store(place[:, None] + m[None, :], total, mask=live[:, None] & (m < M)[None, :])
    if GRAM:
        for k in tl.static_range(PAIRS):
            tl.store(place + M + k, grams[k], mask=live)
    else:
        tl.store(place + M, tl.sum(squares, axis=1), mask=live)


def can_project(x: Tensor) -> bool:
    """Whether `post_res_project` serves streams like x: [T, n, C]."""
    return x.dtype == torch.bfloat16 and x.shape[1] in (1, 2, 3, 4)


def post_res_project(
    x: Tensor,
    f: Tensor,
    mappings: Tensor,
    weight: Tensor,
    f_bias: Tensor | None = None,
    gram: bool = False,
    parts_of_x: int = FULL.parts,
    reads: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x' [T, n, C], and the parts of its projection [pieces, T, part_rows] fp32 that `pre_forward` takes; and
    the layer input [T, C] or None.

    Args:
        x: [T, n, C] bf16; f: [T, C] bf16; mappings: [T, rows of parts_of_x] fp32, of this connection.
        weight: [M, n*C] fp32, of the next one; M > 0.
        f_bias, and f: [s, b, C]: as in `post_res_forward`.
        gram: for a `pre_forward` with a norm.
        parts_of_x: as `parts` of `post_res_forward`.
        reads: make the layer input, with h_pre of `mappings`.

    Source: arXiv 2512.24880 Eqs. (3), (14)-(16).
    """
    T, n, C = x.shape
    M = weight.shape[0]
    BT, BC = (16, 16) if INTERPRETED else (64, 32)
    # One program a multiprocessor is resident: two rounds of 132 of them, however few tokens there are.
    size, pieces = split(C, max(1, min(16, 264 * BT // max(T, 1))), BC)
    out = streams_like(x, f)
    parts = torch.empty(pieces, T, part_rows(M, n, gram), device=x.device, dtype=torch.float32)
    layer_input = x.new_empty(T, C) if reads else None
    if T:
        _boundary_kernel[(triton.cdiv(T, BT), pieces)](
            x, f, f_bias, mappings, weight, out, parts, layer_input, T, C, size,
            n, parts_of_x, M, mapping_block(M), BT, BC, 3, gram, INTERPRETED, num_warps=8,
        )  # fmt: skip
    return out, parts, layer_input
