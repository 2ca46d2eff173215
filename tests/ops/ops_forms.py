"""Connections of every form: each of h_pre, h_post and H_res learned or fixed, in each arithmetic."""

import torch
from ops_cases import DEVICE, error, norm_like

from megatron_mhc.ops import autograd, reference
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.kernels import TRITON
from megatron_mhc.ops.options import MIXES, READS, WRITES, Form, Options

ALL = READS + WRITES + MIXES
FORMS = {  # deepseek_v4, post_magnitude, post_eps
    "paper": (False, 2.0, 0.0),
    "deepseek_v4": (True, 2.0, 0.0),
    "hy_v4": (True, 1.5, 1e-2),  # an eps that shows
}
# (tokens, streams, channels, dtype, arithmetic, parts, norm)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    (5, 4, 48, F32, "hy_v4", READS + WRITES, False),
    (7, 4, 80, BF16, "hy_v4", READS + WRITES, True),
    (9, 2, 48, F16, "paper", READS + WRITES, False),
    (3, 8, 16, F32, "hy_v4", READS + WRITES, True),
    (2, 1, 16, F32, "paper", READS + WRITES, False),
    (5, 4, 48, BF16, "deepseek_v4", WRITES + MIXES, False),
    (5, 4, 48, F32, "paper", WRITES + MIXES, True),
    (9, 2, 48, F32, "paper", READS + MIXES, False),
    (3, 8, 16, BF16, "deepseek_v4", READS + MIXES, True),
    (9, 4, 48, BF16, "paper", MIXES, True),
    (5, 2, 32, F32, "deepseek_v4", MIXES, False),
    (7, 4, 80, BF16, "paper", READS, False),
    (5, 2, 48, F32, "hy_v4", READS, True),
    (9, 8, 16, BF16, "hy_v4", WRITES, False),
    (5, 4, 48, F32, "paper", WRITES, True),
    (7, 4, 48, BF16, "paper", 0, False),
    (5, 2, 80, F32, "deepseek_v4", 0, True),
    (3, 1, 16, F32, "paper", 0, False),
    (0, 4, 32, BF16, "hy_v4", READS + WRITES, False),
    (0, 4, 32, BF16, "paper", 0, True),
    # Three streams, in tiles of four.
    (5, 3, 48, F32, "paper", ALL, False),
    (7, 3, 80, BF16, "deepseek_v4", ALL, True),
    (37, 3, 48, F32, "deepseek_v4", ALL, False),
    (9, 3, 48, BF16, "hy_v4", READS + WRITES, True),
    (5, 3, 32, F16, "paper", MIXES, False),
    (5, 3, 32, F32, "paper", WRITES, True),
    (5, 3, 16, F32, "paper", 0, True),
]


def options_of(arithmetic, parts, iterations=3):
    v4, magnitude, eps = FORMS[arithmetic]
    return Options(1e-6, iterations, v4, 0, Form(parts, magnitude, eps))


def inputs(tokens, n, channels, dtype, parts):
    """x, weight [M, n*C], affine [M + number of alphas], f."""
    generator = torch.Generator().manual_seed(tokens + n + parts)
    rows = Form(parts).rows(n)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    alphas = torch.tensor([0.5, 0.7, 0.9][: parts.bit_count()], device=DEVICE)
    x, f = rand(tokens, n, channels).to(dtype), rand(tokens, channels).to(dtype)
    return [x, rand(rows, n * channels) * 0.05, torch.cat([rand(rows), alphas]), f]


def norm_for(f, n, wanted):
    # Of a single stream h_pre scales l, of which but for eps nothing is left in y: d h_pre would cancel.
    return norm_like(f, eps=1.0 if n == 1 else 1e-5) if wanted else None


def exact_mappings(x, weight, affine, options):
    """By the reference."""
    n, (parts, magnitude, eps) = x.shape[1], options.form
    learned = [bool(parts & bit) for bit in (READS, WRITES, MIXES)]
    logits = x.new_empty(x.shape[0], 0, dtype=reference.coefficient_dtype(x))
    if parts:
        bias, rest = affine.split([weight.shape[0], parts.bit_count()])
        rest = iter(rest.split(1))
        alphas = tuple(next(rest) if on else None for on in learned)
        logits = reference.mapping_logits(x, weight, alphas, bias, options.norm_eps)
    return reference.mhc_mappings(
        logits,
        n,
        deepseek_v4=options.deepseek_v4,
        post_magnitude=magnitude,
        post_eps=eps,
        sinkhorn_iterations=options.iterations,
        **dict(zip(("dynamic_pre", "dynamic_post", "dynamic_res"), learned, strict=True)),
    )


def connection(x, weight, affine, f, options, norm, exact):
    """Layer input, next streams and mappings."""
    if exact:
        h = exact_mappings(x, weight, affine, options)
        return reference.pre(x, h.h_pre, norm), reference.post_res(x, f, h.h_post, h.h_res), h
    layer_input, mappings = autograd.pre(x, weight, affine, options, norm=norm)
    return layer_input, autograd.post_res(f, mappings), mappings


NAMES = ("d x", "d weight", "d affine", "d f", "d norm")


def leaves_of(tensors, norm, exact):
    tensors = tensors if norm is None else [*tensors, norm.weight]
    leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in tensors]
    return leaves, norm and norm._replace(weight=leaves[-1])


def noise(seed, like, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(DEVICE).to(dtype)


def errors_of(case):
    """Relative errors of outputs, coefficients and every gradient, Triton against float64."""
    tokens, n, channels, dtype, arithmetic, parts, wanted = case
    tensors, options = inputs(tokens, n, channels, dtype, parts), options_of(arithmetic, parts)
    norm, results = norm_for(tensors[-1], n, wanted), []
    for exact in (True, False):
        leaves, of_norm = leaves_of(tensors, norm, exact)
        read, streams, h = connection(*leaves[:4], options, of_norm, exact)
        wide = torch.float64 if exact else dtype
        dl, dx = noise(1, read, dtype).to(wide), noise(2, streams, dtype).to(wide)
        torch.autograd.backward([read, streams], [dl, dx])
        results.append((read, streams, h, [leaf.grad for leaf in leaves]))
    (want_l, want_x, want_h, want), (got_l, got_x, got_h, got) = results
    errors = {"layer_input": error(got_l, want_l), "streams": error(got_x, want_x)}
    for name in ("h_pre", "h_post", "h_res"):
        errors[name] = error(getattr(got_h, name), getattr(want_h, name))
    for name, a, b in zip(NAMES, got, want, strict=False):
        if b is not None and b.numel():
            errors[name] = error(a, b)
        else:
            assert a is None or not a.numel(), name
    return errors


def chain(case, how):
    """Output and gradients of three connections with the same parameters.

    how: exact, apart, linked, or ahead, where post_res makes the next one's projection.
    """
    tokens, n, channels, dtype, arithmetic, parts, wanted = case
    tensors, options = inputs(tokens, n, channels, dtype, parts), options_of(arithmetic, parts)
    leaves, norm = leaves_of(tensors, norm_for(tensors[-1], n, wanted), how == "exact")
    x, weight, affine, f = leaves[:4]
    for _ in range(3):
        if how == "exact":
            h = exact_mappings(x, weight, affine, options)
            x = reference.post_res(x, f + 0.5 * reference.pre(x, h.h_pre, norm), h.h_post, h.h_res)
            continue
        read, mappings = autograd.pre(x, weight, affine, options, norm=norm)
        next_pre = NextPre(TRITON, weight, affine, options, norm) if how == "ahead" else None
        x = autograd.post_res(f + 0.5 * read, mappings, linked=how != "apart", next_pre=next_pre)
    grads = torch.autograd.grad(x, leaves, noise(3, x, x.dtype), allow_unused=True)
    return [x, *(g for g in grads if g is not None and g.numel())]
