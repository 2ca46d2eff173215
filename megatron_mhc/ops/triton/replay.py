"""Several connections in a row from their coefficients (Triton): the streams stay in registers.

    x -> l_0 = h_pre_0 . x,  x_1 = H_res_0 x + h_post_0^T f_0,  l_1 = h_pre_1 . x_1,  x_2 = ...

Where a norm is folded into `pre`, its output stands for l.

For recompute: x is read once, each f is read, each l and each x after the first is written. 6 + 4 / k units
for each of k connections, where pre and post_res take 14. Order and rounding are those of `pre` and
`post_res`, so the bits are the same.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mhc.ops.options import ReadNorm
from megatron_mhc.ops.triton.common import load_norm_weight, load_output
from megatron_mhc.ops.triton.post_res import FULL, mixed, programs, tile


def at_once(n: int) -> int:
    """Connections of one launch, which unrolls them: with more, compiling takes minutes for n = 8."""
    return 4 if n < 8 else 2


class Connection(NamedTuple):
    """What a connection kept: coefficients [T, M] fp32 (h_pre, h_post, h_res; those that are learned),
    f [T, C], where its layer input [T, C] goes, None for nowhere, what post_res added to f, if anything: [C],
    the norm folded into its `pre`, with what that kept of it, and what it was read with in place of its
    h_pre, if anything: [T, n]."""

    mappings: Tensor
    f: Tensor
    layer_input: Tensor | None
    f_bias: Tensor | None = None
    norm: ReadNorm | None = None
    norm_saved: Tensor | None = None
    h_pre: Tensor | None = None


@triton.jit
def _replay_kernel(
    x, mappings, givens, fs, f_biases, norm_weights, norms_saved, layer_inputs, streams, T, C,
    K: tl.constexpr, READS: tl.constexpr, WRITES: tl.constexpr, BIASES: tl.constexpr,
    NORMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, GIVEN: tl.constexpr,
    N: tl.constexpr, PARTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """K connections; bit k of READS: write its layer input, of WRITES: the streams behind it, of BIASES:
    add a bias to its f, of NORMS: a norm is folded into its `pre`, of ZERO_CENTERED: whose weight is so, of
    GIVEN: it is read with another's weights."""
    M: tl.constexpr = N * (PARTS % 2) + N * (PARTS // 2 % 2) + N * N * (PARTS // 4)
    t, c, live, keep = tile(T, C, BT, BC)
    narrow = t[:, None] * C + c[None, :]
    xs = ()
    for j in tl.static_range(N):
        xs = xs + (tl.load(x + (t * N + j)[:, None] * C + c[None, :], mask=keep, other=0.0).to(tl.float32),)
    for k in tl.static_range(K):
        row = mappings[k] + t * M
        if (READS >> k) & 1:
            acc = tl.zeros([BT, BC], tl.float32)
            for j in tl.static_range(N):
                if PARTS % 2:
                    if (GIVEN >> k) & 1:
                        read = tl.load(givens[k] + t * N + j, mask=live, other=0.0)
                    else:
                        read = tl.load(row + j, mask=live, other=0.0)
                    if (NORMS >> k) & 1:
                        read *= tl.load(norms_saved[k] + t * (N + 1) + N, mask=live, other=0.0)
                    acc += read[:, None] * xs[j]
                else:
                    acc += xs[j]
            if PARTS % 2 == 0:
                if (NORMS >> k) & 1:
                    inverse_rms = tl.load(norms_saved[k] + t * (N + 1) + N, mask=live, other=0.0)
                    acc *= (inverse_rms * (1.0 / N))[:, None]
                else:
                    acc *= 1.0 / N
            if (NORMS >> k) & 1:
                acc *= load_norm_weight(norm_weights[k], c, C, (ZERO_CENTERED >> k) & 1)[None, :]
            tl.store(layer_inputs[k] + narrow, acc.to(layer_inputs[k].dtype.element_ty), mask=keep)
        if (WRITES >> k) & 1:
            if (BIASES >> k) & 1:
                fv = load_output(fs[k], f_biases[k], narrow, c[None, :], C, keep)
            else:
                fv = load_output(fs[k], None, narrow, c[None, :], C, keep)
            ys = ()
            for i in tl.static_range(N):
                rounded = mixed(row, xs, fv, live, i, N, PARTS).to(streams[k].dtype.element_ty)
                tl.store(streams[k] + (t * N + i)[:, None] * C + c[None, :], rounded, mask=keep)
                ys = ys + (rounded.to(tl.float32),)
            xs = ys


def replay(x: Tensor, row: list[Connection], behind: bool, parts: int = FULL.parts) -> list[Tensor]:
    """Write the layer inputs of a row of connections, and return the streams between them.

    Args:
        x: [T, n, C], the first one's streams.
        row: at most `at_once(n)`.
        behind: return the streams behind the last one too.
        parts: of the `Form` of all of them.

    Source: arXiv 2512.24880 Eq. (3).
    """
    T, n, C = x.shape
    count = len(row)
    writes = (1 << (count if behind else count - 1)) - 1
    streams = [torch.empty_like(x) for _ in range(count if behind else count - 1)]
    reads = sum((entry.layer_input is not None) << k for k, entry in enumerate(row))
    biases = sum((entry.f_bias is not None) << k for k, entry in enumerate(row))
    folded = [(entry.norm, k) for k, entry in enumerate(row) if entry.norm is not None]
    norms, zero_centered = sum(1 << k for _, k in folded), sum(norm.zero_centered << k for norm, k in folded)
    given = sum((entry.h_pre is not None) << k for k, entry in enumerate(row))
    if T == 0 or not (reads or writes):
        return streams
    grid, sizes = programs(T, C)
    with torch.cuda.device_of(x):
        _replay_kernel[grid](
            x,
            tuple(entry.mappings for entry in row),
            tuple(entry.mappings if entry.h_pre is None else entry.h_pre for entry in row),
            tuple(entry.f for entry in row),
            tuple(entry.f if entry.f_bias is None else entry.f_bias for entry in row),
            tuple(entry.f if entry.norm is None else entry.norm.weight for entry in row),
            tuple(entry.mappings if entry.norm_saved is None else entry.norm_saved for entry in row),
            tuple(entry.f if entry.layer_input is None else entry.layer_input for entry in row),
            (*streams, x)[:count],  # the last one's is not written without `behind`
            T, C, count, reads, writes, biases, norms, zero_centered, given, n, parts, *sizes, num_warps=4,
        )  # fmt: skip
    return streams
