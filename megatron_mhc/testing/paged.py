"""Attention of Megatron's dynamic inference in plain torch, for a CPU, where flash-attn does not run.

Only the two functions of flash-attn that Megatron calls, and its Triton kernel that appends to the cache, are
replaced. Blocks, requests, contexts, controllers and engines are the real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Have Megatron call the functions of this file."""
    import megatron.core.inference.contexts.dynamic_context as dynamic_context
    import megatron.core.transformer.attention as attention

    attention.is_fa_min_version = lambda *_: True
    attention.flash_attn_varlen_func = flash_attn_varlen_func
    attention.flash_attn_with_kvcache = flash_attn_with_kvcache
    if attention.rearrange is None:  # of einops, which Megatron calls once, to join the heads
        attention.rearrange = lambda x, _: x.flatten(2)
    dynamic_context.triton_append_key_value_cache = None  # Megatron's own code in torch then does it


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    window_size: tuple[int, int],
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of sequences that lie one behind the other in q: [tokens, heads, d], to a cache of blocks.

    Args:
        k, v: [blocks, tokens of a block, groups, d].
        cu_seqlens_q, cu_seqlens_k: where each sequence starts and ends, int32 [sequences + 1].
        block_table: the blocks of each sequence, int32 [sequences, most blocks].
    """
    assert causal and window_size == (-1, -1) and not return_attn_probs
    out = torch.zeros_like(q)
    for i, (start, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
        length = int(cu_seqlens_k[i + 1] - cu_seqlens_k[i])
        if end > start:
            out[start:end] = _attend(q[start:end], k, v, block_table[i], length, softmax_scale)
    return out


def flash_attn_with_kvcache(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: Tensor,
    num_splits: int,
    **_: Any,
) -> Tensor:
    """Attention of each sequence's newest tokens, q: [sequences, tokens, heads, d], to a cache of blocks."""
    assert causal and window_size == (-1, -1)
    used = block_table.clamp(min=0).long()
    keys, values = (cache[used].flatten(1, 2) for cache in (k_cache, v_cache))  # [sequences, most, groups, d]
    repeat, most, tokens = q.shape[2] // keys.shape[2], keys.shape[1], q.shape[1]
    keys, values = (part.repeat_interleave(repeat, 2).transpose(1, 2) for part in (keys, values))
    scores = q.transpose(1, 2) @ keys.mT * softmax_scale  # [sequences, heads, tokens, most]
    # Without a look at the lengths, which a CUDA graph could not have.
    own = cache_seqlens[:, None] - tokens + torch.arange(tokens, device=q.device)  # [sequences, tokens]
    later = torch.arange(most, device=q.device) > own[..., None]
    mixed = scores.masked_fill(later[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return (mixed @ values.nan_to_num(0.0)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, length: int, scale: float) -> Tensor:
    """q: [tokens, heads, d], the last of a sequence of this length."""
    used = blocks[: -(-length // k.shape[1])].long()
    keys, values = (cache[used].flatten(0, 1)[:length] for cache in (k, v))
    repeat = q.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(repeat, 1).transpose(0, 1) for part in (keys, values))
    scores = q.transpose(0, 1) @ keys.mT * scale  # [heads, tokens, length]
    first = length - q.shape[0]
    later = torch.ones(q.shape[0], length, dtype=torch.bool).triu(first + 1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)
