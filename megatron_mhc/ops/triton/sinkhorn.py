"""Sinkhorn-Knopp of a few tokens in registers, forward and backward (Triton).

Matrices are [BT, NP, NP], NP a power of two. Where n = N is none, rows and columns behind N hold what leaves
the others alone: of logits a block of the identity beside H, of what is no logit zeros.
"""

import triton
import triton.language as tl


@triton.jit
def unfused_product(a, b):
    """a * b for a sum over threads.

    A product fused into the first addition of such a sum is rounded in the partner's half alone: threads
    that hold the same sum would hold different bits, and which of them are stored would be left to chance.
    """
    return tl.where(b == b, a * b, b)


@triton.jit
def _log_normalise(z, AXIS: tl.constexpr):
    z = z - tl.max(z, axis=AXIS, keep_dims=True)
    return z - tl.log(tl.sum(tl.exp(z), axis=AXIS, keep_dims=True))


@triton.jit
def _log_normalise_bwd(y, dy, AXIS: tl.constexpr):
    return dy - tl.exp(y) * tl.sum(dy, axis=AXIS, keep_dims=True)


@triton.jit
def _divide(m, AXIS: tl.constexpr):
    return m / (tl.sum(m, axis=AXIS, keep_dims=True) + 1e-6)


@triton.jit
def _divide_bwd(m, dy, AXIS: tl.constexpr):
    total = tl.sum(m, axis=AXIS, keep_dims=True) + 1e-6
    return (dy - tl.sum(unfused_product(dy, m), axis=AXIS, keep_dims=True) / total) / total


@triton.jit
def _inside(v, other, N: tl.constexpr, NP: tl.constexpr):
    """v [BT, NP, NP] in the N rows and columns that exist, `other` elsewhere."""
    if N == NP:
        return v
    else:
        i = tl.arange(0, NP)
        return tl.where((i < N)[None, :, None] & (i < N)[None, None, :], v, other)


@triton.jit
def _padded(z, N: tl.constexpr, NP: tl.constexpr):
    """Logits [BT, NP, NP] of H and, behind it, of the identity."""
    if N == NP:
        return z
    else:
        i = tl.arange(0, NP)
        beside = tl.where(i[:, None] == i[None, :], 0.0, -1e30)[None, :, :]
        return _inside(z, tl.broadcast_to(beside, z.shape), N, NP)


@triton.jit
def sinkhorn_fwd(z, N: tl.constexpr, NP: tl.constexpr, ITERATIONS: tl.constexpr, V4: tl.constexpr):
    """H_res of logits z [BT, NP, NP]; under V4 both are comb, [BT, stream read, stream written].

    Source: arXiv 2512.24880 Eq. (9); `reference.sinkhorn` and `reference.sinkhorn_deepseek_v4`.
    """
    z = _padded(z, N, NP)
    if V4:
        m = _divide(_inside(tl.exp(_log_normalise(z, 2)) + 1e-6, 0.0, N, NP), 1)
        for _ in tl.range(ITERATIONS - 1):
            m = _divide(_divide(m, 2), 1)
        return m
    else:
        for _ in tl.range(ITERATIONS):
            z = _log_normalise(_log_normalise(z, 1), 2)
        return tl.exp(z)


@triton.jit
def sinkhorn_bwd(z, dm, N: tl.constexpr, NP: tl.constexpr, ITERATIONS: tl.constexpr, V4: tl.constexpr):
    """H_res again, and the gradient of its logits from the gradient dm [BT, NP, NP] of H_res.

    Replays the truncated iterations and walks them back; each step is a handful of registers a thread,
    so none of it goes through memory, and the gradient is exact however far they converged.
    """
    z = _padded(z, N, NP)
    if V4:
        p = _inside(tl.exp(_log_normalise(z, 2)), 0.0, N, NP)
        m = _inside(p + 1e-6, 0.0, N, NP)
        past = (m,)
        m = _divide(m, 1)
        for _ in tl.static_range(ITERATIONS - 1):
            past = past + (m,)
            m = _divide(m, 2)
            past = past + (m,)
            m = _divide(m, 1)
        for i in tl.static_range(ITERATIONS - 1):
            # Beside the matrix a division by eps alone would grow without bound.
            dm = _inside(_divide_bwd(past[2 * (ITERATIONS - 1) - 2 * i], dm, 1), 0.0, N, NP)
            dm = _inside(_divide_bwd(past[2 * (ITERATIONS - 1) - 2 * i - 1], dm, 2), 0.0, N, NP)
        dm = _inside(_divide_bwd(past[0], dm, 1), 0.0, N, NP)
        return m, p * (dm - tl.sum(unfused_product(dm, p), axis=2, keep_dims=True))
    else:
        past = (z,)
        for _ in tl.static_range(ITERATIONS):
            z = _log_normalise(z, 1)
            past = past + (z,)
            z = _log_normalise(z, 2)
            past = past + (z,)
        m = tl.exp(z)
        dz = dm * m
        for i in tl.static_range(ITERATIONS):
            dz = _log_normalise_bwd(past[2 * ITERATIONS - 2 * i], dz, 2)
            dz = _log_normalise_bwd(past[2 * ITERATIONS - 2 * i - 1], dz, 1)
        return m, dz
