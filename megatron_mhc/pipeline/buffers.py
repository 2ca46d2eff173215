"""Buffers that Megatron keeps once per process, and that two micro-batches of a fused step must not share.

docs/pipeline.md lists what else a process has once, and why that is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor


@contextmanager
def own_buffers() -> Iterator[None]:
    """Have Megatron's global memory buffer return new memory at each call.

    Megatron reuses one buffer, on the assumption that nothing else runs until its contents are read. In a
    fused step the node of another micro-batch does, on the same stream or on another one. Copying the
    contents would not help on another stream.
    """
    shared = GlobalMemoryBuffer.get_tensor
    GlobalMemoryBuffer.get_tensor = _own
    try:
        yield
    finally:
        GlobalMemoryBuffer.get_tensor = shared


def _own(
    self: GlobalMemoryBuffer,
    tensor_shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
    mem_alloc_context: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Tensor:
    with (mem_alloc_context or nullcontext)():
        return torch.empty(tensor_shape, dtype=dtype, device=torch.cuda.current_device())
