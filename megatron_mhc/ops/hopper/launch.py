"""Launches of a compiled kernel: its arguments lie packed in host memory, where a launch patches addresses.

What a launch needs besides addresses (function, grid, numbers, memory in which blocks exchange sums) follows
from the kernel, the shapes, the stream and the thread. A `Plan` settles it once.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOX = 64  # channels that a copy takes
_MOST_MAPS = 1024  # of one argument of one plan
_ALIGNED = 64  # floats, of the parts of a workspace


def checked(result: tuple[Any, ...], what: str) -> Any:
    """The values of a cuda-bindings call.

    Raises:
        RuntimeError: it failed.
    """
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"{what} failed: {code!r}")
    return values[0] if len(values) == 1 else values


class Box(NamedTuple):
    """How a kernel copies tiles of a [T, n, C] or [T, C] bf16 tensor (n = 1) to or from shared memory.

    Args:
        width: channels of a slice, a multiple of BOX.
        streams: that one copy takes.
        tile: tokens of a tile.
    """

    tokens: int
    n: int
    channels: int
    width: int
    streams: int
    tile: int

    def tensor_map(self, address: int) -> Any:
        """The CUtensorMap of such a tensor at `address`."""
        from cuda.bindings import driver

        tokens, n, channels = self.tokens, self.n, self.channels
        whole = channels % BOX == 0  # else the last box of a stream would reach into the next one
        sizes = (BOX, tokens, channels // BOX, n) if whole else (channels, tokens, 1, n)
        box = (BOX, self.tile, self.width // BOX, self.streams) if whole else (BOX, self.tile, 1, 1)
        strides = (2 * channels * n, 2 * BOX, 2 * channels)
        result = driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            4,
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return checked(result, "cuTensorMapEncodeTiled")


class Plan:
    """Launches of one kernel with tensors of one shape, on one stream, by one thread.

    A kernel's parameters are tensor maps, then addresses, then the workspace, then numbers.

    Args:
        boxes: of the tensor maps.
        workspace: floats of each part of it; zero when the kernel starts.
        numbers: int (32 bits) and float (32 bits).
    """

    def __init__(
        self,
        function: Any,
        threads: int,
        shared: int,
        blocks: int,
        boxes: tuple[Box, ...],
        workspace: tuple[int, ...],
        numbers: tuple[int | float, ...],
    ):
        self._boxes = boxes
        self._maps: list[dict[int, int]] = [{} for _ in boxes]  # address of a tensor -> of its map
        self._kept: list[Any] = []
        self._device = torch.cuda.current_device()
        self._stream = raw_stream(self._device)
        self._launch = (int(function), blocks, 1, 1, threads, 1, 1, shared, self._stream)
        self._numbers = [ctypes.c_float(v) if isinstance(v, float) else ctypes.c_int(v) for v in numbers]
        starts = [0]
        for floats in workspace:
            starts.append(starts[-1] + -(-floats // _ALIGNED) * _ALIGNED)
        *self._starts, self._floats = starts
        self._places: Any = None

    def launch(self, mapped: Sequence[Tensor], plain: Sequence[Tensor | None]) -> None:
        """Launch the kernel.

        Args:
            mapped: contiguous tensors that `boxes` describe.
            plain: the others, contiguous; None is a null pointer.
        """
        driver = _driver()
        if self._places is None:
            self._pack(len(plain))
        places, addresses = self._places, self._addresses
        for at, tensor in enumerate(mapped):
            address = tensor.data_ptr()
            places[at] = self._maps[at].get(address) or self._map(at, address)
        for at, other in enumerate(plain):
            addresses[at] = 0 if other is None else other.data_ptr()
        if torch._C._cuda_isCurrentStreamCapturing():
            # A graph may be replayed on any stream: its launches have memory of its own, which what the graph
            # launches behind them reuses.
            workspace = _empty(self._device, self._floats)
        else:
            workspace = _workspace(self._device, self._stream, self._floats)
        start = workspace.data_ptr()
        for at, offset in enumerate(self._starts, len(plain)):
            addresses[at] = start + 4 * offset
        code = driver.cuMemsetD8Async(start, 0, 4 * self._floats, self._stream)
        code = code or driver.cuLaunchKernel(*self._launch, self._at, None)
        if code:
            raise RuntimeError(f"cuLaunchKernel failed with CUDA error {code}")

    def _pack(self, plain: int) -> None:
        pointers, boxes = plain + len(self._starts), len(self._boxes)
        self._addresses = (ctypes.c_uint64 * pointers)()
        self._places = (ctypes.c_void_p * (boxes + pointers + len(self._numbers)))()
        first = ctypes.addressof(self._addresses)
        for at in range(pointers):
            self._places[boxes + at] = first + 8 * at
        for at, number in enumerate(self._numbers, boxes + pointers):
            self._places[at] = ctypes.addressof(number)
        self._at = ctypes.addressof(self._places)

    def _map(self, at: int, address: int) -> int:
        if len(self._kept) >= _MOST_MAPS * len(self._boxes):
            self._kept.clear()
            for maps in self._maps:
                maps.clear()
        made = self._boxes[at].tensor_map(address)
        self._kept.append(made)
        self._maps[at][address] = made.getPtr()
        return self._maps[at][address]


def raw_stream(device: int) -> int:
    """The device's current stream, as the driver knows it."""
    return torch._C._cuda_getCurrentRawStream(device)


class _Workspaces(threading.local):
    """A thread's, by device and stream, whose kernels run one after the other.

    Of two threads that launch on one stream, as autograd's and the one that runs forward do, one may clear
    between the other's clearing and its kernel, which would then write what the next kernel takes for zeros.
    """

    def __init__(self) -> None:
        self.of: dict[tuple[int, int], Tensor] = {}


_workspaces = _Workspaces()


def _workspace(device: int, stream: int, floats: int) -> Tensor:
    """At least so many floats that this thread's kernels of this stream share."""
    workspace = _workspaces.of.get((device, stream))
    if workspace is None or workspace.numel() < floats:
        workspace = _workspaces.of[device, stream] = _empty(device, floats)
    return workspace


def _empty(device: int, floats: int) -> Tensor:
    return torch.empty(floats, dtype=torch.float32, device=torch.device("cuda", device))


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    library.cuMemsetD8Async.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, pointer]
    return library
