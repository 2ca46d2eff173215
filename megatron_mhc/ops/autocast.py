"""What torch.autocast may not change: the dtype of a product, and the state that a replay runs in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR = "tk,mk->tm"
State = tuple[bool, torch.dtype]  # whether autocast is on, and to which dtype it casts


def product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum of two factors of one dtype, in that dtype; so is its gradient, under autocast or not.

    Args:
        equation: every index of a factor stands in the other or in the result.
    """
    if torch.is_autocast_enabled(a.device.type):
        return _Product.apply(equation, a, b)
    return _multiply(equation, a, b)


def _multiply(equation: str, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(a, b) if equation == LINEAR else torch.einsum(equation, a, b)


class _Product(torch.autograd.Function):
    """Without autocast, backward too: a fused pipeline schedule goes backward amid a forward pass."""

    @staticmethod
    def forward(ctx: Any, equation: str, a: Tensor, b: Tensor) -> Tensor:
        ctx.equation = equation
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return _multiply(equation, a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        factors, of_result = ctx.equation.split("->")
        of_a, of_b = factors.split(",")
        da = db = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                da = torch.einsum(f"{of_result},{of_b}->{of_a}", g, b)
            if ctx.needs_input_grad[2]:
                db = torch.einsum(f"{of_result},{of_a}->{of_b}", g, a)
        return None, da, db


def state(device_type: str) -> State:
    """The state that `within` brings back."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def within(then: State, device_type: str) -> AbstractContextManager[Any]:
    """Run the block in a `state` of another time."""
    if then == state(device_type):
        return nullcontext()
    # No cache: it would keep casts that were made without a graph for a pass that needs one.
    return torch.autocast(device_type, dtype=then[1], enabled=then[0], cache_enabled=False)


def outside(device_type: str) -> AbstractContextManager[Any]:
    """Run the block without autocast."""
    return within((False, torch.get_autocast_dtype(device_type)), device_type)
