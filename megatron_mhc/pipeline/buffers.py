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


class _Steps:
    """Those under way. Of the process, and not of a thread: autograd's asks for buffers too."""

    count = 0


@contextmanager
def own_buffers() -> Iterator[None]:
    """Have Megatron's global memory buffer return new memory at each call.

    Megatron reuses one buffer, on the assumption that nothing else runs until its contents are read. In a
    fused step the node of another micro-batch does, on the same stream or on another one. Copying the
    contents would not help on another stream.

    Raises:
        RuntimeError: the hooks are reverted, `own_in_fused_steps` among them.
    """
    if not hasattr(GlobalMemoryBuffer.get_tensor, "__wrapped__"):
        raise RuntimeError(
            "--mhc-pipeline-schedule fused needs the hooks of megatron_mhc.register(), which were reverted"
        )
    _Steps.count += 1
    try:
        yield
    finally:
        _Steps.count -= 1


def own_in_fused_steps(get_tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `GlobalMemoryBuffer.get_tensor` with `own_buffers`."""

    def get(
        self: GlobalMemoryBuffer,
        tensor_shape: tuple[int, ...],
        dtype: torch.dtype,
        name: str,
        mem_alloc_context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Tensor:
        if not _Steps.count:
            return get_tensor(self, tensor_shape, dtype, name, mem_alloc_context)
        with (mem_alloc_context or nullcontext)():
            return torch.empty(tensor_shape, dtype=dtype, device=torch.cuda.current_device())

    return get
