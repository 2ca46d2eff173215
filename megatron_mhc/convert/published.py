"""mHC's mapping parameters under published names: Hugging Face's and DeepSeek's own.

Hugging Face has DeepSeek-V4's, and those of two models more under the preset of their name: GLM-5.3-Flash,
whose text model lies inside a multimodal one and has no head, and HY-V4, without H_res.
Those of the gated residual, under qwen4_exp, have the names that `gated` knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.checkpoint_keys import ARITHMETIC, encode_arithmetic, ends_decoder
from megatron_mhc.config import MHCConfig
from megatron_mhc.convert import gated
from megatron_mhc.convert.check import (
    CONNECTION,
    SUBLAYERS,
    check_tensor,
    is_equal_head,
    width,
)
from megatron_mhc.convert.names import HEADS, check_state, rename
from megatron_mhc.convert.orientation import is_comb, turn

_OURS = re.compile(r"(^|[._])hc_")  # model.hc_head.hc_fn, hc_attn_fn
_THEIRS = re.compile(r"(^|\.)(attn|ffn)_hc\.")
_PREFIXES = ("", "model.", "model.language_model.")  # which a part of a model leaves out


def to_published(
    state: dict[str, Any], names: str, mhc: MHCConfig, first_layer: int = 0
) -> dict[str, Tensor]:
    """Mapping parameters of a plugin's state dict under published names.

    Args:
        state: entries of a model or pipeline stage under the plugin's names.
        names: of `PUBLISHED`.
        mhc: options of the checkpoint.
        first_layer: 0-based index of the first layer in `state`, where its layers are numbered from 0.

    Returns:
        fp32 tensors fn [m, n*C], base [m], scale [3] of every sub-layer, of HY-V4 [2]; those of the head at
        the end, which GLM-5.3 has not.

    Raises:
        ValueError: as `rename`.
    """
    if mhc.is_gated:
        return gated.to_published(state, mhc, first_layer)
    state = rename(state, "plugin", "megatron-dev", mhc)
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in state.items():
        if not (match := CONNECTION.match(key)):
            continue
        number, sublayer, part = match.groups()
        rows = value if number is None else value[None]
        for i, row in enumerate(rows):
            layer = first_layer + (i if number is None else int(number))
            parts.setdefault((layer, sublayer), {})[part] = row
    out = {}
    for (layer, sublayer), found in sorted(parts.items()):
        fn, base, scale = _published_keys(names, layer, sublayer, mhc)
        out[fn], out[base] = found["mapping_proj.weight"].contiguous(), found["bias"].contiguous()
        out[scale] = torch.cat([found["alpha_" + part] for part in mhc.parts])
    for theirs, ours in zip(_head(names, mhc), HEADS["megatron-dev"], strict=False):
        if ours in state:
            out[theirs] = state[ours]
    return out


def _head(names: str, mhc: MHCConfig) -> tuple[str, ...]:
    """Published keys of the learned output head: fn, base, scale."""
    return () if mhc.preset == "glm_5_3" or mhc.contract == "h_pre" else HEADS[names]


def _published_keys(names: str, layer: int, sublayer: str, mhc: MHCConfig) -> tuple[str, str, str]:
    short = "attn" if sublayer == "self_attention" else "ffn"
    if names == "transformers":
        inside = "language_model." if mhc.preset == "glm_5_3" else ""
        prefix = f"model.{inside}layers.{layer}.{short}_hc."
    else:
        prefix = f"layers.{layer}.hc_{short}_"
    return prefix + "fn", prefix + "base", prefix + "scale"


def is_mapping(key: str) -> bool:
    """Whether a published key is one of mHC's main layers or head; others' MTP layers have mHC too."""
    if key.startswith("mtp."):
        return False
    return bool(_OURS.search(key) or _THEIRS.search(key)) or gated.is_mapping(key)


def from_published(
    published: Mapping[str, Any], names: str, mhc: MHCConfig, into: dict[str, Any], first_layer: int = 0
) -> dict[str, Any]:
    """Put published mapping parameters into a plugin's state dict.

    Args:
        published: entries under `names`; others than those of mHC are ignored.
        mhc: the plugin's options; its preset decides about the transposition. A model that takes the mean
            or sum of its streams takes a head of equal weights for it.
        into: entries of the plugin's model or pipeline stage, which give layers and dtypes.
        first_layer: as in `to_published`.

    Returns:
        a copy of `into` with its mapping parameters, head and arithmetic replaced.

    Raises:
        ValueError: an entry of `into` or `published` is absent, of another shape or dtype, or not finite.
    """
    if mhc.is_gated:
        return gated.from_published(published, mhc, into, first_layer)
    check_state(into, "plugin", mhc)
    out = dict(into)
    n, swap = mhc.num_residual_streams, not is_comb("plugin", mhc)
    for key, value in into.items():
        if not (match := CONNECTION.match(key)):
            continue
        number, sublayer, part = match.groups()
        layers = range(value.shape[0]) if number is None else [int(number)]
        shape = value.shape[1:] if number is None else value.shape
        rows = [_take(published, names, first_layer + layer, sublayer, part, shape, mhc) for layer in layers]
        if swap:
            rows = [turn(part, row, n) for row in rows]
        out[key] = (torch.stack(rows) if number is None else rows[0]).to(value.dtype).contiguous()
    has_head, theirs = HEADS["plugin"][0] in into, _head(names, mhc)
    if theirs and (has_head or ends_decoder(into)):
        shapes = ((n, n * width(into, n)), (n,), (1,))
        head = [_checked(published, key, shape) for key, shape in zip(theirs, shapes, strict=True)]
        if has_head:
            for ours, value in zip(HEADS["plugin"], head, strict=True):
                out[ours] = value.to(into[ours].dtype).contiguous()
        elif not is_equal_head(*head):
            raise ValueError(
                f"{HEADS[names][0]} weighs the streams unequally, and {HEADS['plugin'][0]} is absent: "
                "convert into a checkpoint with a learned head"
            )
    if ARITHMETIC in into:
        out[ARITHMETIC] = encode_arithmetic(mhc)
    return out


def check_left_over(published: Iterable[str], names: str, layers: int, mhc: MHCConfig) -> None:
    """Check that a model of this many layers and these options takes every mapping parameter among the keys.

    Raises:
        ValueError: naming the first key that it would leave.
    """
    if mhc.is_gated:
        return gated.check_left_over(published, layers)
    taken = set(_head(names, mhc))
    for layer in range(layers):
        taken.update(*(_published_keys(names, layer, sublayer, mhc) for sublayer in SUBLAYERS))
    for key in published:
        if is_mapping(key) and not {prefix + key for prefix in _PREFIXES} & taken:
            raise ValueError(f"{key} is left over: the other checkpoint has {layers} layers")


def _take(
    published: Mapping[str, Any],
    names: str,
    layer: int,
    sublayer: str,
    part: str,
    shape: tuple[int, ...],
    mhc: MHCConfig,
) -> Tensor:
    fn, base, scale = _published_keys(names, layer, sublayer, mhc)
    if part.startswith("alpha_"):
        at = list(mhc.parts).index(part.removeprefix("alpha_"))
        return _checked(published, scale, (len(mhc.parts),))[at : at + 1]
    return _checked(published, fn if part == "mapping_proj.weight" else base, shape)


def _checked(published: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    return check_tensor(key, _get(published, key), shape)


def _get(published: Mapping[str, Any], key: str) -> Any:
    for name in (key.removeprefix(prefix) for prefix in _PREFIXES):
        if name in published:
            return published[name]
    raise ValueError(f"{key} is absent")
