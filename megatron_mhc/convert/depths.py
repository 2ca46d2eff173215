"""Layers of multi-token prediction between n streams, under this package's names and those of Megatron's dev.

Both have `enorm`, `hnorm`, `e_proj`, `h_proj` and the connections of one transformer layer. This package
keeps the contraction in the depth's final norm, dev at the depth itself.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from megatron_mhc.checkpoint_keys import DEPTH, encode_arithmetic
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.convert.check import SUBLAYERS, check_finite, check_tensor, is_equal_head, parts_of
from megatron_mhc.convert.orientation import equal_head, is_comb, turn

_CONNECTION = re.compile(
    r"^(?:transformer_layer|mtp_model_layer)\.(self_attention|mlp)_hyper_connection\.(.+)$"
)
_NORM, _PLAIN_NORM, _ARITHMETIC = "final_layernorm.norm.", "final_layernorm.", "final_layernorm._extra_state"
_HEADS = {
    "plugin": tuple("final_layernorm.head." + part for part in ("mapping_proj.weight", "bias", "alpha")),
    "megatron-dev": tuple("hc_head_" + part for part in ("fn", "base", "scale")),
}


def rename_depths(state: dict[str, Any], source: str, target: str, mhc: MHCConfig) -> dict[str, Any]:
    """The entries of `mtp.layers.*` under the target's names; plain ones as they are.

    Args:
        state: entries of a model or of a pipeline stage of it.
        source, target: of `names.MEGATRON`.
        mhc: the plugin's options.

    Raises:
        ValueError: entries that are not those of `mhc`, or that the target has no form of.
    """
    depths: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if match := DEPTH.match(key):
            depths.setdefault(match[1], {})[match[2]] = value
    out: dict[str, Any] = {}
    for number, entries in depths.items():
        prefix = f"mtp.layers.{number}."
        renamed = entries
        between = next((key for key in entries if _CONNECTION.match(key) or key.startswith("e_proj.")), None)
        if between is not None and mhc.mtp != "multistream":
            raise ValueError(f"{prefix}{between} is of {flag('mtp')} multistream: give mtp=multistream")
        if between is None and mhc.mtp == "multistream":
            raise ValueError(f"{prefix}* is of {flag('mtp')} single: give mtp=single")
        if between is not None:
            if {source, target} != set(_HEADS):
                raise ValueError(f"{prefix}{between}: this part of mHC has no counterpart in megatron-main")
            try:
                renamed = _renamed(entries, source, target, mhc)
            except ValueError as error:
                raise ValueError(f"{prefix}{error}") from None
        elif unknown := next((key for key in entries if "hyper_connection" in key), None):
            raise ValueError(f"{prefix}{unknown}: this part of mHC has no counterpart")
        out |= {prefix + key: value for key, value in renamed.items()}
    return out


def _renamed(entries: dict[str, Any], source: str, target: str, mhc: MHCConfig) -> dict[str, Any]:
    n, width = mhc.num_residual_streams, _width(entries)
    _check(entries, source, mhc, width)
    swap = is_comb(source, mhc) != is_comb(target, mhc)
    heads = dict(zip(_HEADS[source], _HEADS[target], strict=True))
    learned, has_head = mhc.contract == "learned_head", _HEADS[source][0] in entries
    if has_head and not learned and not is_equal_head(*(entries[key] for key in heads)):
        raise ValueError(f"{next(iter(heads))} is a learned output head: give contract=learned_head")
    if learned and not has_head:
        raise ValueError(f"{next(iter(heads))} is absent, though contract=learned_head")
    out: dict[str, Any] = {}
    for key, value in entries.items():
        if match := _CONNECTION.match(key):
            out[key] = turn(match[2], value, n) if swap else value
        elif key in heads:
            if learned:
                out[heads[key]] = value
        elif key.split("/")[0] == _ARITHMETIC:
            continue  # dev: of Transformer Engine's norm
        elif source == "plugin" and key.startswith(_NORM):
            out[_PLAIN_NORM + key.removeprefix(_NORM)] = value
        elif source != "plugin" and key.startswith(_PLAIN_NORM):
            out[_NORM + key.removeprefix(_PLAIN_NORM)] = value
        else:
            out[key] = value
    if target == "plugin":
        out[_ARITHMETIC] = encode_arithmetic(mhc)
    elif not learned:
        out.update(zip(_HEADS[target], equal_head(n, width), strict=True))
    return out


def _check(entries: dict[str, Any], source: str, mhc: MHCConfig, width: int) -> None:
    check_finite(entries)
    n, rows = mhc.num_residual_streams, sum(mhc.parts.values())
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(parts_of(mhc), (1,))
    shapes |= {"mapping_proj.weight": (rows, n * width), "bias": (rows,)}
    found = {match.groups(): key for key in entries if (match := _CONNECTION.match(key))}
    for sublayer in SUBLAYERS:
        for part, shape in shapes.items():
            if (sublayer, part) not in found:
                raise ValueError(f"{sublayer}_hyper_connection.{part} is absent")
            key = found.pop((sublayer, part))
            check_tensor(key, entries[key], shape)
    if found:
        raise ValueError(f"{next(iter(found.values()))}: unknown mapping parameter")
    if _HEADS[source][0] in entries:
        for key, shape in zip(_HEADS[source], ((n, n * width), (n,), (1,)), strict=True):
            if key not in entries:
                raise ValueError(f"{key} is absent, though {_HEADS[source][0]} is there")
            check_tensor(key, entries[key], shape)


def _width(entries: dict[str, Any]) -> int:
    norm = entries.get("hnorm.weight")
    if not isinstance(norm, Tensor) or norm.dim() != 1:
        raise ValueError("hnorm.weight is absent")
    return norm.shape[0]
