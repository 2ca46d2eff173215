"""Sinkhorn-Knopp of a few tokens in registers, forward and backward (Triton)."""

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
def sinkhorn_fwd(z, ITERATIONS: tl.constexpr, V4: tl.constexpr):
    """H_res of logits z [BT, n, n]; under V4 both are comb, [BT, stream read, stream written].

    Source: arXiv 2512.24880 Eq. (9); `reference.sinkhorn` and `reference.sinkhorn_deepseek_v4`.
    """
    if V4:
        m = _divide(tl.exp(_log_normalise(z, 2)) + 1e-6, 1)
        for _ in tl.range(ITERATIONS - 1):
            m = _divide(_divide(m, 2), 1)
        return m
    else:
        for _ in tl.range(ITERATIONS):
            z = _log_normalise(_log_normalise(z, 1), 2)
        return tl.exp(z)


@triton.jit
def sinkhorn_bwd(z, dm, ITERATIONS: tl.constexpr, V4: tl.constexpr):
    """H_res again, and the gradient of its logits from the gradient dm [BT, n, n] of H_res.

    Replays the truncated iterations and walks them back; each step is a handful of registers a thread,
    so none of it goes through memory, and the gradient is exact however far they converged.
    """
    if V4:
        p = tl.exp(_log_normalise(z, 2))
        m = p + 1e-6
        past = (m,)
        m = _divide(m, 1)
        for _ in tl.static_range(ITERATIONS - 1):
            past = past + (m,)
            m = _divide(m, 2)
            past = past + (m,)
            m = _divide(m, 1)
        for i in tl.static_range(ITERATIONS - 1):
            dm = _divide_bwd(past[2 * (ITERATIONS - 1) - 2 * i], dm, 1)
            dm = _divide_bwd(past[2 * (ITERATIONS - 1) - 2 * i - 1], dm, 2)
        dm = _divide_bwd(past[0], dm, 1)
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
