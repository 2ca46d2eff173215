"""Connections in a row with the RMSNorm in front of F, F otherwise the identity: providers for `kernels`.

folded     `pre` writes the norm's output, and its backward takes the gradient of that
separate   the same kernels with a norm of its own behind `pre`: Transformer Engine's, on a CPU torch's
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ON_GPU
from megatron_mhc.ops import reference
from megatron_mhc.ops.options import Options, ReadNorm

EPS = 1e-5
OPTIONS = Options(1e-6, 20, False)


def norm_module(width: int, dtype: torch.dtype) -> nn.Module:
    """An RMSNorm [.., width] with weights in `dtype`."""
    if not ON_GPU:
        return nn.RMSNorm(width, EPS, dtype=dtype)
    import transformer_engine.pytorch as te

    return te.RMSNorm(width, eps=EPS, dtype=dtype)


def in_a_row(drawn: list[Tensor], count: int, backend: str, folds: bool, boundary: str = "fused") -> Any:
    """`kernels.Connections` of the operations, without the modules around them.

    Args:
        drawn: streams [T, n, C], phi and affine. backend: a name of `ops.kernels`, or `reference`.
        boundary: `fused` or `linked`, of --mhc-boundary.
    """
    from benchmarks.kernels import Connections

    x, *values = drawn
    tokens, n, width = x.shape
    row = []
    for _ in range(count):
        weight, affine = (v.detach().clone().requires_grad_() for v in values)
        norm = norm_module(width, x.dtype).to(x.device)
        row.append((weight, affine, norm, ReadNorm(norm.weight, EPS, False) if folds else None))
    leaf = x.detach().view(tokens, 1, n * width).requires_grad_()
    run = _by_reference if backend == "reference" else functools.partial(_by_kernels, backend, boundary)

    def read(streams: Tensor) -> Tensor:
        return run(streams, row[:1], n)[0]

    parameters = [p for weight, affine, norm, _ in row for p in (weight, affine, norm.weight)]
    return Connections(lambda streams: run(streams, row, n)[1], [leaf, *parameters], read)


def _by_reference(streams: Tensor, row: list[Any], n: int) -> tuple[Tensor, Tensor]:
    """The last F's input, and the streams behind it."""
    x = streams.view(streams.shape[0], n, -1)
    for weight, affine, norm, folded in row:
        bias, *alphas = affine.split([len(affine) - 3, 1, 1, 1])
        logits = reference.mapping_logits(x, weight, tuple(alphas), bias, OPTIONS.norm_eps)
        h = reference.mhc_mappings(logits, n, sinkhorn_iterations=OPTIONS.iterations)
        y = reference.pre(x, h.h_pre, folded)
        y = y if folded else norm(y)
        x = reference.post_res(x, y, h.h_post, h.h_res)
    return y, x.view(streams.shape)


def _by_kernels(backend: str, how: str, streams: Tensor, row: list[Any], n: int) -> tuple[Tensor, Tensor]:
    from megatron_mhc.ops import autograd, boundary
    from megatron_mhc.ops.kernels import BY_NAME
    from megatron_mhc.ops.link import NextPre

    kernels = BY_NAME[backend]
    for (weight, affine, norm, folded), following in zip(row, [*row[1:], None], strict=True):
        made = boundary.taken(streams, weight, affine, folded)
        if made is None:
            made = autograd.pre(streams, weight, affine, OPTIONS, kernels, n, folded)
        y, mappings = made
        y = y if folded else norm(y)
        next_pre = None
        if following is not None and how == "fused":
            next_weight, next_affine, _, next_folded = following
            next_pre = NextPre(kernels, next_weight, next_affine, OPTIONS, next_folded)
        if next_pre is not None and boundary.can_join(mappings, y, next_pre):
            streams = boundary.post_res_pre(y, mappings, next_pre)
        else:
            streams = autograd.post_res(y, mappings, next_pre=next_pre)
    return y, streams


PROVIDERS = {
    "hopper, fused, norm folded": functools.partial(in_a_row, backend="hopper", folds=True),
    "hopper, fused, norm separate": functools.partial(in_a_row, backend="hopper", folds=False),
    "triton, linked, norm folded": functools.partial(
        in_a_row, backend="triton", folds=True, boundary="linked"
    ),
    "triton, linked, norm separate": functools.partial(
        in_a_row, backend="triton", folds=False, boundary="linked"
    ),
}
ON_CPU = {
    "reference, norm folded": functools.partial(in_a_row, backend="reference", folds=True),
    "reference, norm separate": functools.partial(in_a_row, backend="reference", folds=False),
}
