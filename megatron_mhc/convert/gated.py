"""The gated residual (`--mhc-preset qwen4_exp`) under the names of transformers' Qwen4-Exp.

n streams, C channels, rank r; L layers in front where Megatron stacks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import ARITHMETIC, CONTRACTION, encode_arithmetic, ends_decoder
from megatron_mhc.config import MHCConfig
from megatron_mhc.convert.check import (
    CONNECTION,
    LAYER,
    SUBLAYERS,
    check_finite,
    check_numbers,
    check_tensor,
    width,
)

PARTS = {  # ours: theirs
    "stream_norm.weight": "hc_norm.weight",
    "read_down.weight": "input_mix_weight_down.weight",
    "read_up.weight": "input_mix_weight_up.weight",
    "inject.weight": "block_inject_weight.weight",
}
MIXER = tuple(PARTS)[:3]  # of which the exit mixer has these
_THEIRS = re.compile(r"(^|\.)((attn|mlp)_hyper_connection|hyper_connection_mixer)\.")
_PREFIXES = ("model.", "model.language_model.", "language_model.", "")  # of one model or another around it


def is_mapping(key: str) -> bool:
    """Whether a published key is one of a gated residual's, of whatever layer."""
    return bool(_THEIRS.search(key))


def check_entries(state: Mapping[str, Any], mhc: MHCConfig) -> None:
    """As `check.check_entries`, of a plugin's state dict with gated residuals."""
    check_finite(state)
    n = mhc.num_residual_streams
    shapes = _shapes(mhc, _width(state, n))
    parts: dict[str | None, set[str]] = {}
    for key, value in state.items():
        if match := CONNECTION.match(key):
            number, sublayer, part = match.groups()
            if part not in PARTS:
                raise ValueError(f"{key}: unknown parameter of a gated residual")
            stack = value.shape[:1] if number is None and isinstance(value, Tensor) else ()
            check_tensor(key, value, (*stack, *shapes[part]))
            parts.setdefault(number, set()).add(f"{sublayer}_hyper_connection.{part}")
        elif match := LAYER.match(key):
            parts.setdefault(match.group(1), set())
    check_numbers(parts)
    for number, found in parts.items():
        prefix = "decoder.layers." + ("" if number is None else f"{number}.")
        for sublayer in SUBLAYERS:
            for part in PARTS:
                if (name := f"{sublayer}_hyper_connection.{part}") not in found:
                    raise ValueError(f"{prefix}{name} is absent")
    there = [part for part in MIXER if CONTRACTION + part in state]
    for part in MIXER if there or ends_decoder(state) else ():
        if part not in there:
            raise ValueError(f"{CONTRACTION}{part} is absent")
        check_tensor(CONTRACTION + part, state[CONTRACTION + part], shapes[part])


def _width(state: Mapping[str, Any], n: int) -> int:
    norms = (v for key, v in state.items() if key.endswith("stream_norm.weight") and isinstance(v, Tensor))
    return width(state, n) or next((norm.shape[-1] // n for norm in norms), 0)


def _shapes(mhc: MHCConfig, width: int) -> dict[str, tuple[int, ...]]:
    n, rank = mhc.num_residual_streams, mhc.gated_rank
    all_of = n * width
    return dict(zip(PARTS, ((all_of,), (rank, all_of), (all_of, rank), (n, all_of)), strict=True))


def _published_key(layer: int, sublayer: str, part: str) -> str:
    short = "attn" if sublayer == "self_attention" else "mlp"
    return f"layers.{layer}.{short}_hyper_connection.{PARTS[part]}"


def _mixer_key(part: str) -> str:
    return f"hyper_connection_mixer.{PARTS[part]}"


def to_published(state: dict[str, Any], mhc: MHCConfig, first_layer: int = 0) -> dict[str, Tensor]:
    """As `published.to_published`: the gated residuals of a plugin's state dict, by published names."""
    check_entries(state, mhc)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := CONNECTION.match(key):
            number, sublayer, part = match.groups()
            for i, row in enumerate(value if number is None else value[None]):
                layer = first_layer + (i if number is None else int(number))
                out["model." + _published_key(layer, sublayer, part)] = row.contiguous()
        elif key.startswith(CONTRACTION):
            out["model." + _mixer_key(key.removeprefix(CONTRACTION))] = value
    return out


def from_published(
    published: Mapping[str, Any], mhc: MHCConfig, into: dict[str, Any], first_layer: int = 0
) -> dict[str, Any]:
    """As `published.from_published`: published gated residuals put into a plugin's state dict."""
    check_entries(into, mhc)
    out = dict(into)
    for key, value in into.items():
        if match := CONNECTION.match(key):
            number, sublayer, part = match.groups()
            layers = range(value.shape[0]) if number is None else [int(number)]
            shape = value.shape[1:] if number is None else value.shape
            rows = [
                _take(published, _published_key(first_layer + layer, sublayer, part), shape)
                for layer in layers
            ]
            out[key] = (torch.stack(rows) if number is None else rows[0]).to(value.dtype).contiguous()
        elif key.startswith(CONTRACTION):
            found = _take(published, _mixer_key(key.removeprefix(CONTRACTION)), value.shape)
            out[key] = found.to(value.dtype).contiguous()
    if ARITHMETIC in into:
        out[ARITHMETIC] = encode_arithmetic(mhc)
    return out


def _take(published: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    for prefix in _PREFIXES:
        if prefix + key in published:
            return check_tensor(prefix + key, published[prefix + key], shape)
    raise ValueError(f"model.{key} is absent")


def check_left_over(published: Iterable[str], layers: int) -> None:
    """As `published.check_left_over`."""
    taken = {_mixer_key(part) for part in MIXER}
    taken |= {_published_key(i, sub, part) for i in range(layers) for sub in SUBLAYERS for part in PARTS}
    names = {prefix + key for prefix in _PREFIXES for key in taken}
    for key in published:
        if is_mapping(key) and key not in names:
            raise ValueError(f"{key} is left over: the other checkpoint has {layers} layers")
