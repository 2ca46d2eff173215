"""Compiles the CUDA sources of this folder by NVRTC, which PyTorch brings, and cuts channels into slices."""

from __future__ import annotations

import functools
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mhc.ops.hopper.launch import BOX, Box, Plan, checked

SHARED = 226 * 1024  # bytes that a block may have beside the barriers
AHEAD = 16  # slices that a lane may read past the last one, in its last round
HERE = Path(__file__).parent


def installed() -> bool:
    """Whether NVRTC and the driver can be called (the package cuda-bindings)."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


class Kernel(NamedTuple):
    """A compiled kernel of one device, and the threads and shared bytes of its blocks."""

    function: Any
    threads: int
    shared: int

    def plan(
        self,
        blocks: int,
        boxes: tuple[Box, ...],
        workspace: tuple[int, ...],
        numbers: tuple[int | float, ...],
    ) -> Plan:
        """See `launch.Plan`; on the device and the stream that are current now."""
        return Plan(self.function, self.threads, self.shared, blocks, boxes, workspace, numbers)


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


_compiling = threading.Lock()


def kernel(source: Source, device: int, shared: int, **defines: int) -> Kernel:
    """The kernel of `source` on the device; compiled once per set of `defines`, whoever asks at once."""
    with _compiling:
        return _kernel(source, device, shared, **defines)


@functools.cache
def _kernel(source: Source, device: int, shared: int, **defines: int) -> Kernel:
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


@functools.lru_cache(maxsize=256)  # of many lengths of sequences
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
def multiprocessors(device: int) -> int:
    """Of the device; one block runs on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count
