"""The layer input from kept coefficients (Triton): l = h_pre . x, into memory that is already there.

`ops.pre` computes coefficients and layer input together. A replay has the coefficients, and spares the
projection and Sinkhorn, which read x once more and take most of that operation's time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.launch import INTERPRETED, power_of_two


@triton.jit
def _read_kernel(
    x, mappings, out, T, C, M: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """out = sum_j h_pre_j x_j, in the order of `ops.pre`, so that the bits are the same."""
    blocks = tl.cdiv(C, BC)
    t = (tl.program_id(0) // blocks * BT + tl.arange(0, BT)).to(tl.int64)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    live = t < T
    keep = live[:, None] & (c < C)[None, :]
    acc = tl.zeros([BT, BC], tl.float32)
    for j in tl.static_range(N):
        h = tl.load(mappings + t * M + j, mask=live, other=0.0)
        xv = tl.load(x + (t * N + j)[:, None] * C + c[None, :], mask=keep, other=0.0)
        acc += h[:, None] * xv.to(tl.float32)
    tl.store(out + t[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=keep)


def read_into(x: Tensor, mappings: Tensor, out: Tensor) -> None:
    """Write the layer input of x: [T, n, C] into out: [T, C].

    Args:
        mappings: [T, n*n + 2n] fp32, h_pre first, as `ops.pre.pre_forward` returns them.

    Source: arXiv 2512.24880 Eq. (3).
    """
    T, n, C = x.shape
    if T == 0:
        return
    BT, BC = (8, power_of_two(C)) if INTERPRETED else (1, min(1024, power_of_two(C)))
    grid = (triton.cdiv(C, BC) * triton.cdiv(T, BT),)
    with torch.cuda.device_of(x):
        _read_kernel[grid](x, mappings, out, T, C, mappings.shape[1], n, BT, BC, num_warps=4)
