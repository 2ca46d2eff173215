"""What a sub-layer hands to the next besides its streams (--mhc-read previous): the weights to read with.

    streams x_k  --connection k-->  h_pre_k, with which sub-layer k+1 reads x_{k+1}

Inside a layer they are an argument. From layer to layer they travel on the tensor of the streams. Where that
tensor goes alone - to another pipeline stage, through Megatron's checkpoint of a layer, across the edge of a
CUDA graph - they are packed behind the channels, see `ops.packed`.

Source: the technical report of DeepSeek-V4.1, single-pass mHC.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.hyper_connection import check_width
from megatron_mhc.ops import packed
from megatron_mhc.parallel import streams_dtype


def alone_width(config: Any, mhc: MHCConfig) -> int:
    """Last dimension of hidden states between layers where their tensor goes alone."""
    n = mhc.num_residual_streams
    wide: int = n * config.hidden_size
    return packed.width(wide, n, streams_dtype(config)) if mhc.reads_previous else wide


def first_weights(streams: Tensor, n: int) -> Tensor:
    """With which the model's first sub-layer reads: stream 0 alone, [s*b, n] in the coefficients' dtype."""
    dtype = torch.float64 if streams.dtype == torch.float64 else torch.float32
    weights = torch.zeros(streams.shape[0] * streams.shape[1], n, dtype=dtype, device=streams.device)
    weights[:, 0] = 1.0
    return weights


def hand_on(streams: Tensor, h_pre: Tensor | None, alone: bool) -> Tensor:
    """The tensor that a layer returns: streams [s, b, n*C] that carry h_pre: [s*b, n], or both packed.

    Args:
        alone: whether it loses what it carries on its way to the next layer.
    """
    if h_pre is None:
        return streams
    if alone or torch.compiler.is_compiling():
        return packed.join(streams, h_pre)
    streams.mhc_h_pre = h_pre  # type: ignore[attr-defined]
    return streams


def taken(hidden_states: Tensor, config: Any, mhc: MHCConfig, where: str) -> tuple[Tensor, Tensor | None]:
    """The streams [s, b, n*C] of what `hand_on` returned, and h_pre: [s*b, n], None if each reads its own.

    Raises:
        ValueError: hidden states of another width, or streams alone, naming `where`.
    """
    wide = mhc.num_residual_streams * config.hidden_size
    if not mhc.reads_previous:
        check_width(hidden_states, wide, where)
        return hidden_states, None
    if not torch.compiler.is_compiling():
        h_pre = getattr(hidden_states, "mhc_h_pre", None)
        if h_pre is not None:
            return hidden_states, h_pre
    alone = alone_width(config, mhc)
    if hidden_states.shape[-1] == wide != alone:
        raise ValueError(
            f"{where}: the streams came without the weights that {flag('read')} previous hands on: what runs "
            "the layers one after the other has to pass on the very tensor that each returns"
        )
    check_width(hidden_states, alone, where)
    return packed.part(hidden_states, wide)
