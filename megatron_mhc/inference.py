"""Megatron's inference on a pipeline, which sends past the messages of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_mhc.carried import options_of


def widen_receive_buffer(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `AbstractModelInferenceWrapper._allocate_recv_buffer`: [s, b, n*C] for a model with n streams."""

    def allocate_streams(self: Any, batch_size: int, seq_len: int) -> Tensor:
        buffer = allocate(self, batch_size, seq_len)
        mhc = options_of(self.model, self.config)
        if mhc is None:
            return buffer
        *tokens, width = buffer.shape
        return buffer.new_empty(*tokens, mhc.num_residual_streams * width)

    return allocate_streams
