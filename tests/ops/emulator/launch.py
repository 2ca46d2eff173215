"""Builds the kernels of ops/hopper for the CPU and runs them in the emulator of runtime.h and scheduler.h.

`Emulator.kernel` takes the place of `compile.kernel`, so that pre.py and pre_backward.py
run as they are.
"""

import ctypes
import functools
import re
import shutil
import subprocess
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_mhc.ops.hopper.compile import Source

HERE = Path(__file__).parent
GUARD = 4096  # bytes before and behind every tensor that nobody may write
# -march=native for fmaf; no contraction, so that all compilers give the same bits
FLAGS = "-std=c++17 -Og -march=native -ffp-contract=off -fno-strict-aliasing -fPIC -shared -w".split()


def compiler():
    """g++'s path, or None."""
    return shutil.which("g++")


@dataclass(frozen=True)
class Schedule:
    """Who goes on when; see `Options` of runtime.h, whose order the fields have."""

    seed: int = 1
    order: int = 1  # 0: in turn, 1: a random warp, 2: a random lane
    copies: int = 0  # 0: arrive at random, 1: as late as can be, 2: at once
    resident: int = 1 << 20  # blocks at a time
    late_blocks: bool = False  # a block starts only when nobody else can go on
    starved_block: int = -1  # -1: of every block
    starved_warps: int = 0  # masks of those that go on only when nobody else can
    starved_lanes: int = 0


class _Options(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("order", "copies", "resident", "late_blocks", "starved_block")),
        *((name, ctypes.c_uint32) for name in ("starved_warps", "starved_lanes")),
    ]


class _Region(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("name", ctypes.c_char_p)]


class EmulatorError(RuntimeError):
    """A deadlock, or something that the hardware does not allow."""


class _Map:
    """What a plan makes of a tensor and its box."""

    def __init__(self, tensor: torch.Tensor, box: Any):
        assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        self.tensor = tensor
        self.shape = box.tokens, box.n, box.channels
        assert tensor.numel() == box.tokens * box.n * box.channels


class _Guarded:
    """A tensor's copy between two guards, NaN in every format."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        self.held = (ctypes.c_ubyte * (self.bytes + 2 * GUARD + 256))()
        ctypes.memset(self.held, 0xFF, len(self.held))
        self.address = -(-(ctypes.addressof(self.held) + GUARD) // 256) * 256
        ctypes.memmove(self.address, tensor.data_ptr(), self.bytes)

    def give_back(self) -> bool:
        """Copy into the tensor; whether the guards are as they were."""
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.bytes)
        start = self.address - ctypes.addressof(self.held)
        outside = bytes(self.held[:start]) + bytes(self.held[start + self.bytes :])
        return outside.count(0xFF) == len(outside)


@dataclass
class Emulator:
    """Stands for the GPU.

    Args:
        folder: where builds are kept.
        bugs: which fault to plant in a kernel; BUG(name) of the sources asks for it.
    """

    folder: Path
    schedule: Schedule = Schedule()
    bugs: dict[str, str] = field(default_factory=dict)
    launched: list[tuple[str, int, dict[str, int]]] = field(default_factory=list)

    def kernel(self, source: Source, device: Any, shared: int, **defines: int) -> Any:
        """For `compile.kernel`."""
        return _Kernel(self, source, shared, defines)


@dataclass
class _Kernel:
    emulator: Emulator
    source: Source
    shared: int
    defines: dict[str, int]

    def plan(self, *how: Any) -> Any:
        """For `compile.Kernel.plan`."""
        return _Plan(self, *how)

    def launch(self, blocks: int, *arguments: Any) -> None:
        """Run with maps, tensors, None and numbers, as the kernel's parameters are."""
        name, emulator, source = self.source.path.stem, self.emulator, self.source
        emulator.launched.append((name, blocks, self.defines))
        defines = dict(SHARED=self.shared, **source.constants, **self.defines)
        run = _build(emulator.folder, source.path, emulator.bugs.get(name, "none"), **defines)
        names = _parameters(source.path, self.defines["NORM"] > 0, self.defines["PREVIOUS"] > 0)
        assert len(names) == len(arguments)

        guarded: dict[Any, _Guarded] = {}
        regions, places = [], []
        for parameter, argument in zip(names, arguments, strict=True):
            tensor = argument.tensor if isinstance(argument, _Map) else argument
            held = None
            if isinstance(tensor, torch.Tensor):
                key = (tensor.data_ptr(), tensor.numel())  # two arguments may be one tensor
                if key not in guarded:
                    guarded[key] = _Guarded(tensor)
                    regions.append(_Region(guarded[key].address, guarded[key].bytes, parameter.encode()))
                held = guarded[key].address
            if isinstance(argument, _Map):
                places.append(_aligned((ctypes.c_uint64 * 16)(held, *argument.shape)))
            elif isinstance(argument, float):
                places.append(_aligned(ctypes.c_float(argument)))
            elif isinstance(argument, int):
                places.append(_aligned(ctypes.c_int(argument)))
            else:
                places.append(_aligned(ctypes.c_void_p(held)))
        pointers = (ctypes.c_void_p * len(places))(*(address for address, _ in places))
        message = ctypes.create_string_buffer(1 << 20)
        failed = run(
            blocks, source.constants["THREADS"], self.shared,
            ctypes.byref(_Options(*(int(value) for value in astuple(self.emulator.schedule)))),
            pointers, (_Region * len(regions))(*regions), len(regions), message, len(message),
        )  # fmt: skip
        intact = [guard.give_back() for guard in guarded.values()]
        if failed:
            raise EmulatorError(f"{name} with {self.defines}: {message.value.decode()}")
        for fine, region in zip(intact, regions, strict=True):
            if not fine:
                raise EmulatorError(f"{name} wrote outside {region.name.decode()}")


@dataclass
class _Plan:
    """Stands for `launch.Plan`."""

    kernel: _Kernel
    blocks: int
    boxes: tuple[Any, ...]
    workspace: tuple[int, ...]
    numbers: tuple[int | float, ...]

    def launch(self, mapped: Any, plain: Any) -> None:
        maps = [_Map(*pair) for pair in zip(mapped, self.boxes, strict=True)]
        exchange = [torch.zeros(floats) for floats in self.workspace]
        self.kernel.launch(self.blocks, *maps, *plain, *exchange, *self.numbers)


def _aligned(value: Any) -> tuple[int, Any]:
    """An address, a multiple of 64, of the value's bytes, and what keeps it."""
    held = (ctypes.c_ubyte * (ctypes.sizeof(value) + 64))()
    address = -(-ctypes.addressof(held) // 64) * 64
    ctypes.memmove(address, ctypes.addressof(value), ctypes.sizeof(value))
    return address, held


@functools.cache
def _parameters(source: Path, norm: bool, previous: bool) -> list[str]:
    """The names of a kernel's parameters."""
    text = source.read_text()
    for name, there in (("NORM", norm), ("PREVIOUS", previous)):
        lines = rf"#if MHC_{name}\n((?:[^#].*\n)*)#endif\n"
        text = re.sub(lines, lambda m, there=there: m[1] if there else "", text)
    signature = re.search(rf"\b{source.stem}\((const __grid_constant__ [^)]*)\) {{", text)[1]
    return [re.search(r"(\w+)$", part.strip())[1] for part in signature.split(",")]


@functools.cache
def _build(folder: Path, source: Path, bug: str, **defines: int) -> Any:
    library = folder / f"{source.stem}{len(list(folder.iterdir()))}.so"
    macros = dict(BUG=bug, KERNEL=source.stem, SOURCE=f'"{source.name}"', **defines)
    command = [compiler(), *FLAGS, *(f"-DMHC_{key}={value}" for key, value in macros.items())]
    command += [f"-I{HERE}", f"-I{source.parent}", str(HERE / "kernel.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ cannot build {source.name}: {done.stderr}")
    return ctypes.CDLL(str(library)).emulate
