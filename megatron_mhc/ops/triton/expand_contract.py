"""The two ends of the streams (Triton): one hidden state becomes n streams, and n streams become one.

    spread   out_i = scale x               5 u for n = 4; u = one stream of all tokens
    gather   out = scale sum_i x_i         5 u

Each is the other's gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.triton.post_res import programs, tile


@triton.jit
def _spread_kernel(x, out, scale, T, C, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t, c, _, keep = tile(T, C, BT, BC)
    v = tl.load(x + t[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32) * scale
    for i in tl.static_range(N):
        tl.store(out + (t * N + i)[:, None] * C + c[None, :], v.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _gather_kernel(x, out, scale, T, C, N: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t, c, _, keep = tile(T, C, BT, BC)
    acc = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(N):
        acc += tl.load(x + (t * N + i)[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * C + c[None, :], (acc * scale).to(out.dtype.element_ty), mask=keep)


def _run(kernel: Any, x: Tensor, out: Tensor, scale: float, n: int) -> Tensor:
    T, C = x.shape[0], x.shape[-1]
    if T:
        grid, sizes = programs(T, C)
        kernel[grid](x.contiguous(), out, scale, T, C, n, *sizes, num_warps=4)
    return out


def spread(x: Tensor, n: int, scale: float = 1.0) -> Tensor:
    """n copies [T, n, C] of x: [T, C] times `scale`, in x's dtype."""
    return _run(_spread_kernel, x, x.new_empty(x.shape[0], n, x.shape[1]), scale, n)


def gather(x: Tensor, scale: float = 1.0) -> Tensor:
    """The sum [T, C] over the streams x: [T, n, C] times `scale`, added in fp32, in x's dtype."""
    return _run(_gather_kernel, x, x.new_empty(x.shape[0], x.shape[2]), scale, x.shape[1])


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        *lead, width = x.shape
        ctx.n = n
        return spread(x.reshape(-1, width), n).view(*lead, n * width)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        *lead, width = g.shape
        return gather(g.reshape(-1, ctx.n, width // ctx.n)).view(*lead, width // ctx.n), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.n, ctx.scale = x.shape[1], scale
        return gather(x, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return spread(g, ctx.n, ctx.scale), None


def expand(hidden_states: Tensor, n: int) -> Tensor:
    """`reference.expand`: n copies [..., n*C] of [..., C] in bf16, fp16 or fp32."""
    return _Spread.apply(hidden_states, n)


def contract(x: Tensor, how: str) -> Tensor:
    """`reference.contract`: the `mean` or `sum` [T, C] of the streams x: [T, n, C] in bf16, fp16 or fp32."""
    return _Gather.apply(x, 1 / x.shape[1] if how == "mean" else 1.0)
