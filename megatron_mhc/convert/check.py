"""What a state dict must hold before it is converted: shapes, numbers, every part of every layer.

n streams, C channels, m = n*n + 2n, or 2n where H_res = I; L layers in front where Megatron stacks them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import NORM, PLAIN_NORM
from megatron_mhc.config import MHCConfig, flag

CONNECTION = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(self_attention|mlp)_hyper_connection\.(.+)$")
LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?self_attention\.linear_proj\.weight$")
SUBLAYERS = ("self_attention", "mlp")


def check_tensor(key: str, value: Any, shape: Sequence[int]) -> Tensor:
    """Return a mapping parameter, which must be floating-point, of this shape and finite.

    Raises:
        ValueError: naming the key and what is wrong.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} is a {type(value).__name__}, not a tensor")
    if not value.is_floating_point():
        raise ValueError(f"{key} is of {value.dtype}, not of a floating-point type")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{key} is of shape {list(value.shape)}, expected {list(shape)}")
    check_finite({key: value})
    return value


def check_finite(state: Mapping[str, Any]) -> None:
    """Raise ValueError for the first tensor that holds a NaN or an infinity."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            # What 8 bits can hold torch's isfinite does not read.
            wide = value.float() if value.dtype.itemsize == 1 else value
            if not wide.isfinite().all():
                raise ValueError(f"{key} holds NaN or infinite values")


def check_numbers(numbers: Iterable[str | None]) -> None:
    """Raise ValueError where a layer is absent between others; None stands for stacked layers."""
    found = sorted({int(number) for number in numbers if number is not None})
    for expected, number in enumerate(found):
        if number != expected:
            raise ValueError(f"decoder.layers.{expected} is absent, though decoder.layers.{number} is there")


def count_layers(state: Mapping[str, Any]) -> int:
    """How many layers a model, or a pipeline stage of it, has.

    Raises:
        ValueError: stacked layers that are no tensors.
    """
    layers = {match.group(1): key for key in state if (match := LAYER.match(key))}
    if None not in layers:
        return len(layers)
    value = state[layers[None]]
    if not isinstance(value, Tensor) or not value.dim():
        raise ValueError(f"{layers[None]} is no tensor of stacked layers")
    return value.shape[0]


def check_entries(state: Mapping[str, Any], heads: Sequence[str], mhc: MHCConfig) -> None:
    """Check the mHC part of a Megatron state dict, and that all of it is finite.

    Args:
        state: entries of a model or of a pipeline stage of it.
        heads: the convention's keys of the learned output head: fn, base, scale.
        mhc: the options that it is read under.

    Raises:
        ValueError: naming the key: absent, of another shape or dtype, not finite, not known.
    """
    check_finite(state)
    n = mhc.num_residual_streams
    rows = sum(mhc.parts.values())
    parts: dict[str | None, dict[str, Any]] = {}
    for key, value in state.items():
        if match := CONNECTION.match(key):
            number, sublayer, part = match.groups()
            if part not in parts_of(mhc):
                raise ValueError(f"{key}: unknown mapping parameter")
            parts.setdefault(number, {})[f"{sublayer}_hyper_connection.{part}"] = value
        elif match := LAYER.match(key):
            parts.setdefault(match.group(1), {})
    check_numbers(parts)
    columns = n * width(state, n)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(parts_of(mhc), (1,))
    shapes |= {"mapping_proj.weight": (rows, columns), "bias": (rows,)}
    for number, found in parts.items():
        prefix = "decoder.layers." + ("" if number is None else f"{number}.")
        stack = _stacked(state, found, prefix) if number is None else ()
        for sublayer in SUBLAYERS:
            for part, shape in shapes.items():
                name = f"{sublayer}_hyper_connection.{part}"
                if name not in found:
                    raise ValueError(f"{prefix}{name} is absent")
                check_tensor(prefix + name, found[name], (*stack, *shape))
    head_shapes = ((n, columns), (n,), (1,))
    there = [key for key in heads if key in state]
    for key, shape in zip(heads, head_shapes, strict=False):
        if there and key not in state:
            raise ValueError(f"{key} is absent, though {there[0]} is there")
        if there:
            check_tensor(key, state[key], shape)


def parts_of(mhc: MHCConfig) -> tuple[str, ...]:
    """Names of a connection's parameters."""
    return "mapping_proj.weight", "bias", *("alpha_" + part for part in mhc.parts)


def width(state: Mapping[str, Any], n: int) -> int:
    """C, by the final norm, by a layer's output projection, or else by a mapping projection."""
    for key in (NORM + "weight", PLAIN_NORM + "weight"):
        if isinstance(state.get(key), Tensor) and state[key].dim() == 1:
            return state[key].shape[0]
    for key, value in state.items():
        if LAYER.match(key) and isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[-2]
    for key, value in state.items():
        if key.endswith("mapping_proj.weight") and isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[-1] // n
    return 0


def _stacked(state: Mapping[str, Any], found: Mapping[str, Any], prefix: str) -> tuple[int]:
    """(L,), by the stacked layers themselves or else by their mapping projections."""
    for key in (prefix + "self_attention.linear_proj.weight", prefix + next(iter(found), "")):
        if isinstance(state.get(key), Tensor) and state[key].dim():
            return (state[key].shape[0],)
    raise ValueError(f"{prefix}*: no tensor of stacked layers")


def check_streams(state: Mapping[str, Any], mhc: MHCConfig) -> None:
    """Compare n with the rows of the mapping projections.

    Raises:
        ValueError: naming the number to give.
    """
    for key, value in state.items():
        if not CONNECTION.match(key) or not key.endswith("mapping_proj.weight"):
            continue
        if not isinstance(value, Tensor) or value.dim() < 2:
            raise ValueError(f"{key} is not a matrix")
        rows, columns = value.shape[-2:]
        mixes = "res" in mhc.parts
        n = math.isqrt(rows + 1) - 1 if mixes else rows // 2
        if n < 1 or n * n * mixes + 2 * n != rows or columns % n:
            raise ValueError(
                f"{key} is {rows} x {columns}: not {'n*n + ' * mixes}2n rows of n*C columns. Mappings with a "
                f"fixed part exist in the plugin alone, but for {flag('preset')} hy_v4, and so does "
                f"{flag('h_res')} unconstrained"
            )
        if n != mhc.num_residual_streams:
            raise ValueError(f"{key} belongs to {n} streams: give num_residual_streams={n}")


def is_equal_head(fn: Tensor, base: Tensor, scale: Tensor) -> bool:
    """Whether a learned output head weighs all streams alike, whatever they hold."""
    return bool((not fn.any() or not scale.any()) and torch.equal(base, base[:1].expand_as(base)))
