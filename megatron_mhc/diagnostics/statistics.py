"""What the diagnostics compute, as functions of matrices: gains, sum errors, geometry of the streams.

Matrices are multiplied per token and their gains averaged afterwards; an average of matrices has a
smaller gain than the matrices. Row i of a mapping says what output stream i reads.

    H     [..., n, n]  mapping of one sub-layer, one per token; n streams
    gram  [..., n, n]  inner products of the streams of one token, x x^T
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor


def amax_gain(m: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute row sum (forward) and column sum (backward) of each matrix.

    Args:
        m: [..., n, n], one H_res or a composite.

    Returns:
        forward [...], by how much m can scale a signal that is equal in all streams; backward [...], the
        same for a gradient.

    Source: the Amax gain of arXiv 2512.24880, max_i |sum_j M_ij| and max_j |sum_i M_ij|.
    """
    return m.sum(dim=-1).abs().amax(dim=-1), m.sum(dim=-2).abs().amax(dim=-1)


def composite(h_res: Sequence[Tensor]) -> Tensor:
    """The mapping of consecutive sub-layers together, H_last ... H_first.

    Args:
        h_res: mappings [T, n, n] of the same tokens, in the order in which the sub-layers run.

    Returns:
        [T, n, n] fp64.

    Raises:
        ValueError: no mapping.

    Source: arXiv 2512.24880 Eq. (4).
    """
    if not h_res:
        raise ValueError("composite of no mappings: capture those of at least one sub-layer")
    return reduce(lambda product, h: h.double() @ product, h_res[1:], h_res[0].double())


def composites_from_input(h_res: Tensor) -> Tensor:
    """The mapping from the model's input through each sub-layer, P_l = H_l ... H_0.

    Args:
        h_res: [L, T, n, n] fp64, all sub-layers in order.

    Returns:
        [L, T, n, n] fp64.

    Source: arXiv 2512.24880 Eq. (4).
    """
    return torch.stack(list(accumulate(h_res, lambda product, h: h @ product)))


def composites_to_output(h_res: Tensor) -> Tensor:
    """The mapping from each sub-layer's input to the model's output, S_l = H_last ... H_l.

    Args:
        h_res: [L, T, n, n] fp64, all sub-layers in order.

    Returns:
        [L, T, n, n] fp64.
    """
    return torch.stack(list(accumulate(h_res.flip(0), lambda product, h: product @ h))).flip(0)


def sum_errors(h_res: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distance from 1 of a row sum, and of a column sum; [...] each, from [..., n, n]."""
    rows, columns = h_res.sum(dim=-1), h_res.sum(dim=-2)
    return (rows - 1).abs().amax(dim=-1), (columns - 1).abs().amax(dim=-1)


def norm_ratio(gram: Tensor) -> Tensor:
    """Norm of the largest stream over that of the smallest; infinite where a stream is zero. [...]"""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return (squares.amax(dim=-1) / squares.amin(dim=-1)).sqrt()


def mean_cosine(gram: Tensor) -> Tensor:
    """Mean cosine between two different streams. [...], from gram [..., n, n] with n > 1."""
    n = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
    cosines = gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    diagonal = cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (cosines.sum(dim=(-2, -1)) - diagonal) / (n * (n - 1))


def effective_rank(gram: Tensor) -> Tensor:
    """How many directions the streams take up, (tr G)^2 / |G|_F^2: 1 if they are parallel, n if they are
    orthogonal and of equal norm. [...], from gram [..., n, n]."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return trace.square() / gram.square().sum(dim=(-2, -1)).clamp_min(torch.finfo(gram.dtype).tiny)
