"""Memory that all ranks of a pipeline write: what `push` needs of a device, and hosts' with the same rules.

A rank copies a tensor into another rank's memory and then sets a word there; a stream waits until a word of
its own rank's memory has reached a value. Words are counts of 32 bits that wrap around.
"""

from __future__ import annotations

import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WRAP = 2**32


def reached(word: int, value: int) -> bool:
    """Whether a count has reached a value, as a stream's wait compares them."""
    return (word - value) % WRAP < WRAP // 2


class Silent(RuntimeError):
    """A word did not reach its value within the timeout."""


class Memory(ABC):
    """Equally many bytes of every rank of a pipeline, zero at first; offsets are in bytes.

    Args:
        rank: the pipeline rank.
        notes: 32-bit words of this host's that its device writes, for the host to read.
    """

    def __init__(self, rank: int, notes: Tensor):
        self.rank, self.notes = rank, notes

    @abstractmethod
    def behind(self, name: str) -> AbstractContextManager[Any]:
        """Around work on a stream of that name, behind everything that the current stream has to do."""

    @abstractmethod
    def until(self, offset: int, value: int) -> None:
        """The current stream waits until this rank's word has reached a value.

        Raises:
            Silent: it did not, where the host is the one that waits.
        """

    @abstractmethod
    def put(self, rank: int, offset: int, value: int) -> None:
        """Set a word of a rank's, behind what the current stream has written."""

    @abstractmethod
    def copy(self, rank: int, offset: int, tensor: Tensor) -> None:
        """Copy a contiguous tensor into a rank's memory."""

    @abstractmethod
    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in this rank's memory, which shares nothing but the memory with others."""

    @abstractmethod
    def note(self, index: int, value: int) -> None:
        """Set a note when the current stream gets there."""

    @abstractmethod
    def note_word(self, index: int, offset: int) -> None:
        """Copy this rank's word into a note when the current stream gets there."""

    @property
    def pends(self) -> bool:
        """Whether `until` returns before its word is there."""
        return False

    def aside(self) -> AbstractContextManager[Any]:
        """Around work on a stream that waits for nothing."""
        return nullcontext()

    def event(self) -> Any:
        """What the current stream has to do so far; `query()` says whether it is done."""
        return _Done()

    def finish(self, check: Callable[[], None]) -> None:
        """Have the host wait for the current stream and those of `behind`; it calls `check` meanwhile."""
        check()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this rank's memory."""
        return False

    def noted(self, index: int) -> int:
        return int(self.notes[index]) % WRAP

    def noted_from(self, index: int, count: int) -> list[int]:
        return [value % WRAP for value in self.notes[index : index + count].tolist()]


class _Done:
    def query(self) -> bool:
        return True


class SharedMemory(Memory):
    """Processes of one host, without streams: every operation is done when it returns.

    It stands in for GPUs on a CPU. The file behind it is gone as soon as all have opened it.

    Args:
        group: the pipeline's process group; all of its ranks call this at the same time.
        size: bytes of each rank.
    """

    def __init__(self, group: Any, size: int, notes: int, timeout: timedelta):
        super().__init__(group.rank(), torch.zeros(notes, dtype=torch.int32))
        self._timeout = timeout.total_seconds()
        path: list[Any] = [None]
        if self.rank == 0:
            folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
            handle, path[0] = tempfile.mkstemp(prefix="mhc_pipeline_", dir=folder)
            os.truncate(handle, size * group.size())
            os.close(handle)
        dist.broadcast_object_list(path, group=group, group_src=0)
        try:
            everything = torch.from_file(path[0], shared=True, size=size * group.size(), dtype=torch.uint8)
            dist.barrier(group=group)
        finally:
            if self.rank == 0:
                os.unlink(path[0])
        self._ranks = everything.split(size)
        self._words = [part.view(torch.int32).numpy() for part in self._ranks]
        self._own = self._ranks[self.rank]

    def behind(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def until(self, offset: int, value: int) -> None:
        words, at, pause = self._words[self.rank], offset // 4, 1e-5
        deadline = time.monotonic() + self._timeout
        while not reached(int(words[at]), value):
            if time.monotonic() > deadline:
                raise Silent
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)

    def put(self, rank: int, offset: int, value: int) -> None:
        self._words[rank][offset // 4] = value % WRAP - (WRAP if value % WRAP >= WRAP // 2 else 0)

    def copy(self, rank: int, offset: int, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.itemsize
        self._ranks[rank][offset : offset + size].view(tensor.dtype).copy_(tensor.view(-1))

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return placed(self._own, offset, shape, dtype)

    def note(self, index: int, value: int) -> None:
        self.notes[index] = value % WRAP - (WRAP if value % WRAP >= WRAP // 2 else 0)

    def note_word(self, index: int, offset: int) -> None:
        self.notes[index] = int(self._words[self.rank][offset // 4])

    def holds(self, tensor: Tensor) -> bool:
        return inside(self._own, tensor)


def placed(memory: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor at an offset of a tensor of bytes: no view, and with a version of its own."""
    at = (memory.storage_offset() + offset) // dtype.itemsize
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return torch.empty(0, dtype=dtype, device=memory.device).set_(
        memory.untyped_storage(), at, shape, strides
    )


def inside(memory: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor begins in a tensor of bytes."""
    return memory.data_ptr() <= tensor.data_ptr() < memory.data_ptr() + memory.numel()
