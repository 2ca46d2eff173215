"""What the kernels for Hopper are compiled for, and launched with, where a norm is folded in (norm.cuh)."""

from typing import NamedTuple

import torch

from megatron_mhc.ops.options import ReadNorm


class Kind(NamedTuple):
    """A `ReadNorm` but for its weight: the dtype of that, eps, and what is added to the weight."""

    dtype: torch.dtype
    eps: float
    offset: float


def kind(norm: ReadNorm) -> Kind:
    """Raises ValueError: the weight's dtype is not one of the kernels'."""
    if norm.weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"the norm's weight is {norm.weight.dtype}, not torch.float32 or torch.bfloat16")
    return Kind(norm.weight.dtype, norm.eps, 1.0 if norm.zero_centered else 0.0)


def define(norm: Kind | None) -> int:
    """MHC_NORM of the sources."""
    return 0 if norm is None else 1 if norm.dtype == torch.float32 else 2
