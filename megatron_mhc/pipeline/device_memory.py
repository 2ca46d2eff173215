"""Memory of GPUs that write each other's over NVLink or PCIe: copy engines move data, streams wait for words.

Nothing here runs on an SM, of the sender or of the receiver.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.hopper.launch import checked
from megatron_mhc.pipeline.memory import WRAP, Memory, inside, placed

GREATER_OR_EQUAL, WITH_BARRIER = 0, 0  # flags of a stream's wait and of its write
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@contextmanager
def _without_multicast() -> Iterator[None]:
    """A rendezvous sets multicast up where there is some; nobody needs it here."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before


class DeviceMemory(Memory):
    """The same bytes on the GPU of every rank of a pipeline, all of one host.

    Args:
        group: the pipeline's process group; all of its ranks call this at the same time.
        size: bytes of each rank.

    Raises:
        RuntimeError: no memory, or the driver does not map it.
    """

    def __init__(self, group: Any, size: int, notes: int):
        from cuda.bindings import driver
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed._symmetric_memory import rendezvous

        super().__init__(group.rank(), torch.zeros(notes, dtype=torch.int32).pin_memory())
        self._driver = driver
        self._device = torch.empty(0, device="cuda").device  # the current one
        torch.cuda.empty_cache()  # this memory is not the caching allocator's
        with _without_multicast():
            self._own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self._device)
            self._own.zero_()
            torch.cuda.synchronize(self._device)
            self._handle = rendezvous(self._own, group)
        self._ranks = [self._handle.get_buffer(r, (size,), torch.uint8) for r in range(group.size())]
        self._starts = [part.data_ptr() for part in self._ranks]
        self._start = self._own.data_ptr()
        self._streams: dict[str, torch.cuda.Stream] = {}
        _, high = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._free = torch.cuda.Stream(self._device, priority=high)

    @contextmanager
    def behind(self, name: str) -> Iterator[Any]:
        stream = self.stream(name)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield stream

    def stream(self, name: str) -> torch.cuda.Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self._device)
        return self._streams[name]

    @contextmanager
    def aside(self) -> Iterator[Any]:
        torch.cuda.set_device(self._device)
        self._free.query()  # by a thread that has no context yet: the runtime makes it current
        with torch.cuda.stream(self._free):
            yield self._free

    @property
    def pends(self) -> bool:
        return True

    def _current(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def until(self, offset: int, value: int) -> None:
        at = self._start + offset
        result = self._driver.cuStreamWaitValue32(self._current(), at, value % WRAP, GREATER_OR_EQUAL)
        checked(result, "cuStreamWaitValue32")

    def put(self, rank: int, offset: int, value: int) -> None:
        self._write(self._starts[rank] + offset, value)

    def _write(self, address: int, value: int) -> None:
        result = self._driver.cuStreamWriteValue32(self._current(), address, value % WRAP, WITH_BARRIER)
        checked(result, "cuStreamWriteValue32")

    def copy(self, rank: int, offset: int, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.itemsize
        target = self._starts[rank] + offset
        result = self._driver.cuMemcpyDtoDAsync(target, tensor.data_ptr(), size, self._current())
        checked(result, "cuMemcpyDtoDAsync")

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return placed(self._own, offset, shape, dtype)

    def note(self, index: int, value: int) -> None:
        self._write(self.notes.data_ptr() + 4 * index, value)

    def note_word(self, index: int, offset: int) -> None:
        # A copy of four bytes, by an engine too.
        source, target = self._start + offset, self.notes.data_ptr() + 4 * index
        checked(self._driver.cuMemcpyDtoHAsync(target, source, 4, self._current()), "cuMemcpyDtoHAsync")

    def event(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event()

    def finish(self, check: Callable[[], None]) -> None:
        events = [stream.record_event() for stream in self._streams.values()] + [self.event()]
        for event in events:
            while not event.query():
                check()
                time.sleep(1e-4)
        check()

    def holds(self, tensor: Tensor) -> bool:
        return inside(self._own, tensor)
