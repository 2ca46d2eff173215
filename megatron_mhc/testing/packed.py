"""Packed sequences (THD) in Megatron's local attention, which takes none: for `--sft` on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention of each sequence by itself.

    Args:
        query, key, value: [t, heads, width]; of keys and values maybe fewer heads.
        lengths: of the sequences, which share the t tokens out.

    Returns:
        [t, 1, heads * width].
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs).flatten(1)[:, None]


def install() -> None:
    """Have DotProductAttention take packed sequences, and megatron.training count their lengths on a CPU."""
    unpacked = DotProductAttention.forward

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        packed = kwargs.pop("packed_seq_params", None)
        if packed is None:
            return unpacked(self, query, key, value, *args, **kwargs)
        bounds = packed.cu_seqlens_q
        return attend(query, key, value, (bounds[1:] - bounds[:-1]).tolist())

    DotProductAttention.forward = forward

    from megatron.training import training

    count = getattr(training, "update_seqlen_stats_from_cu_seqlens", None)
    if count is None:  # Megatron before 0.19
        return

    def update_seqlen_stats_from_cu_seqlens(cu_seqlens: Tensor | None) -> None:
        if training._seqlen_stats_in_iteration is None:  # else made on "cuda:<current device>"
            training._seqlen_stats_in_iteration = torch.zeros(2, dtype=torch.float64)
        count(cu_seqlens)

    training.update_seqlen_stats_from_cu_seqlens = update_seqlen_stats_from_cu_seqlens
