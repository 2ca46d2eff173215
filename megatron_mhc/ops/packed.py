"""Coefficients behind channels in one tensor, bit by bit, for where only one tensor can go: [s, b, W + k]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops import reference

# `contiguous` makes no copy of a single token's row, which is contiguous in the midst of a packed one.


def _copy(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def width(channels: int, coefficients: int, dtype: torch.dtype) -> int:
    """Last dimension of a packed tensor of this dtype; coefficients count in their own, fp32 or fp64."""
    size = reference.coefficient_dtype(torch.empty(0, dtype=dtype)).itemsize
    return channels + coefficients * size // dtype.itemsize


def pack(channels: Tensor, coefficients: Tensor) -> Tensor:
    """Join channels: [s, b, W] and coefficients: [s*b, k] of the coefficient dtype, without a graph."""
    s, b, _ = channels.shape
    bits = _copy(coefficients.detach()).view(channels.dtype)
    return torch.cat([channels.detach(), bits.view(s, b, bits.shape[-1])], dim=-1)


def unpack(packed: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """channels: [s*b, W], a part of what is packed, and coefficients: [s*b, k], a copy."""
    flat = packed.view(-1, packed.shape[-1])
    wide, bits = flat.split([channels, flat.shape[-1] - channels], dim=-1)
    return wide, _copy(bits).view(reference.coefficient_dtype(wide))


def places(packed: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """What `unpack` returns, in place: rows of the packed tensor; of an even width."""
    flat = packed.view(-1, packed.shape[-1])
    return flat[:, :channels], flat[:, channels:].view(reference.coefficient_dtype(flat))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, channels: Tensor, coefficients: Tensor) -> Tensor:
        ctx.channels = channels.shape[-1]
        return pack(channels, coefficients)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        wide, coefficients = unpack(gradient.contiguous(), ctx.channels)
        return _copy(wide).view(*gradient.shape[:2], ctx.channels), coefficients


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        wide, coefficients = unpack(packed, channels)
        return _copy(wide).view(*packed.shape[:2], channels), coefficients

    @staticmethod
    def backward(ctx: Any, wide: Tensor, coefficients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return pack(wide, coefficients), None


def join(channels: Tensor, coefficients: Tensor) -> Tensor:
    """`pack` for autograd: the gradient is packed too, so nothing but `part` may read what this returns."""
    return _Join.apply(channels, coefficients)


def part(packed: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Undo `join`: channels [s, b, W] and coefficients [s*b, k], copies, with gradients."""
    return _Part.apply(packed, channels)
