"""Compiles the CUDA sources of this folder by NVRTC and launches them; PyTorch brings both libraries."""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOX = 64  # channels that a copy takes
SHARED = 226 * 1024  # bytes that a block may have beside the barriers
AHEAD = 16  # slices that a lane may read past the last one, in its last round
HERE = Path(__file__).parent


def installed() -> bool:
    """Whether NVRTC and the driver can be called (the package cuda-bindings)."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def checked(result: tuple[Any, ...], what: str) -> Any:
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"{what} failed: {code!r}")
    return values[0] if len(values) == 1 else values


class Kernel(NamedTuple):
    """A compiled kernel of one device, and the threads and shared bytes of its blocks."""

    function: Any
    threads: int
    shared: int

    def launch(self, blocks: int, device: torch.device, *arguments: Any) -> None:
        """Run it on the device's current stream.

        Args:
            arguments: tensors, which go in as their address, numbers, None and `tensor_map`s.
        """
        from cuda.bindings import driver

        kept = [_argument(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(kept))(*(place for place, _ in kept))
        stream = torch.cuda.current_stream(device).cuda_stream
        result = driver.cuLaunchKernel(
            self.function, blocks, 1, 1, self.threads, 1, 1, self.shared, stream, ctypes.addressof(places), 0
        )
        checked(result, "cuLaunchKernel")


def _argument(value: Any) -> tuple[int, Any]:
    """Where the argument lies, and what keeps it there."""
    if hasattr(value, "getPtr"):
        return value.getPtr(), value
    if isinstance(value, float):
        held: Any = ctypes.c_float(value)
    elif isinstance(value, int):
        held = ctypes.c_int(value)
    else:
        held = ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.addressof(held), held


def tensor_map(tensor: Tensor, width: int, streams: int, tile: int) -> Any:
    """What copies between global and shared memory need to know of a [T, n, C] or [T, C] tensor in bf16.

    Args:
        width: channels of a slice, a multiple of BOX.
        streams: that one copy brings.
        tile: tokens of a tile.
    """
    shape = tensor.shape if tensor.dim() == 3 else (tensor.shape[0], 1, tensor.shape[1])
    return _tensor_map(tensor.data_ptr(), *shape, width // BOX, streams, tile)


@functools.lru_cache(maxsize=4096)  # the allocator hands out the same places again and again
def _tensor_map(address: int, tokens: int, n: int, channels: int, boxes: int, streams: int, tile: int) -> Any:
    from cuda.bindings import driver

    whole = channels % BOX == 0  # else the last box of a stream would reach into the next one
    sizes = (BOX, tokens, channels // BOX, n) if whole else (channels, tokens, 1, n)
    box = (BOX, tile, boxes, streams) if whole else (BOX, tile, 1, 1)
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


class Source:
    """A kernel's file, named as the kernel, and the constants that Python shares with it."""

    def __init__(self, path: Path, **constants: int) -> None:
        self.path, self.constants = path, constants


@functools.cache
def cubin(source: Path, **defines: int) -> bytes:
    """`source` compiled for Hopper, in about a second; this needs no GPU.

    Args:
        defines: macros, without the MHC_ that their names begin with.

    Raises:
        RuntimeError: NVRTC cannot compile it; says why.
    """
    from cuda.bindings import nvrtc

    headers = sorted(HERE.glob("*.cuh"))
    texts, names = [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    created = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), texts, names)
    program = checked(created, "nvrtcCreateProgram")
    options = ["--gpu-architecture=sm_90a", "--std=c++17", "-default-device"]
    options += [f"-DMHC_{key}={value}" for key, value in defines.items()]
    compiled = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(compiled[0]) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC cannot compile {source.name} with {defines}:\n{log.decode()}")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    checked(nvrtc.nvrtcGetCUBIN(program, binary), "nvrtcGetCUBIN")
    return binary


@functools.cache
def kernel(source: Source, device: int, shared: int, **defines: int) -> Kernel:
    """The kernel of `source` on the device; compiled once per set of `defines`."""
    from cuda.bindings import driver

    binary = cubin(source.path, SHARED=shared, **source.constants, **defines)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context current in this thread
        module = checked(driver.cuModuleLoadData(binary), "cuModuleLoadData")
        function = checked(
            driver.cuModuleGetFunction(module, source.path.stem.encode()), "cuModuleGetFunction"
        )
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared), "cuFuncSetAttribute")
    return Kernel(function, source.constants["THREADS"], shared)


class Layout(NamedTuple):
    """How C channels are cut: `slices` of `width`, a block each; the tokens go round `groups` of them."""

    width: int
    slices: int
    groups: int

    def defines(self, channels: int, tile: int, stages: int) -> dict[str, int]:
        """What shape.cuh and exchange.cuh ask for.

        Args:
            tile: tokens.
            stages: tiles in a block's shared memory.
        """
        return dict(
            CHANNELS=channels, WIDTH=self.width, SLICES=self.slices, TILE=tile, BOX=BOX,
            STAGES=stages, EXCHANGE=2 * stages,
        )  # fmt: skip


def layout(tokens: int, channels: int, widest: int, blocks: int, tile: int, reserved: int = 0) -> Layout:
    """The cut of `channels` (a multiple of 16) that leaves the fewest of `blocks` idle but for the reserved.

    A launch divides its tiles among groups of blocks beforehand. A group that finds no free SMs starts after
    the others have ended, and the kernel takes twice as long; with one group fewer all run at once.

    Args:
        widest: a width is a multiple of BOX up to this; of equals the widest is taken.
        reserved: blocks to leave out, as long as a row of channels has enough.

    Raises:
        ValueError: a row of channels needs more than `blocks`.
    """
    least = min(blocks, -(-channels // widest))
    return _layout(tokens, channels, widest, max(least, blocks - reserved), tile)


@functools.cache
def _layout(tokens: int, channels: int, widest: int, blocks: int, tile: int) -> Layout:
    tiles = -(-tokens // tile)
    best, most = None, 0.0
    for width in range(widest, 0, -BOX):
        slices = -(-channels // width)
        groups = min(tiles, blocks // slices)
        busy = groups * channels / width  # a last slice that is cut short counts as the part it is
        if groups and busy > most * 1.02:
            best, most = Layout(width, slices, groups), busy
    if best is None:
        raise ValueError(f"{channels} channels need more than {blocks} blocks of {widest}")
    return best


@functools.cache
def loads(slices: int, step: int, most: int) -> int:
    """How many sums a lane of `step` asks for at once: as few as take no more rounds than `most` do."""
    each = -(-slices // step)
    return -(-each // -(-each // most))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; one block runs on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count
