"""Which operations, done for the first time, hold the host up while a kernel runs on another stream.

    python scripts/bench/module_loading.py [--out loading.json] [--at-once 6]

A kernel that spins until a flag in host memory is set stands for a receive whose sender is late. Beside it,
on another stream, the host does one thing that it has not done before, and sets the flag 2 s later: an
operation that returns only then has waited for the kernel, and a pipeline could hang in it. Every operation
has a process of its own, under CUDA_MODULE_LOADING=LAZY and =EAGER. Needs cuda-bindings. --out is written
after every row; the table comes at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_mhc.ops.hopper.compile import Kernel, checked

Operation = Callable[[], Any]
MODES = ("LAZY", "EAGER")
DELAY, BOUND = 2.0, 5.0  # seconds: when the flag is set, and when the kernel ends in any case
SPIN = """
__device__ long long now() { long long t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); return t; }
extern "C" __global__ void spin(volatile int* flags, int milliseconds) {
    long long end = now() + 1000000LL * milliseconds;
    flags[1] = 1;  // it runs
    __threadfence_system();
    while (flags[0] == 0 && now() < end) __nanosleep(1000);
}
"""
EMPTY = 'extern "C" __global__ void empty(int* out) { out[0] = 1; }'


@triton.jit
def earlier(out):
    tl.store(out, 1)


@triton.jit
def later(out):
    tl.store(out, tl.load(out) + 1)


def compiled(source: str, name: str) -> Callable[[], Kernel]:
    """Compile a kernel of one thread on the host; returns what loads it."""
    from cuda.bindings import driver, nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"a.cu", 0, [], []), "nvrtcCreateProgram")
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    checked(nvrtc.nvrtcCompileProgram(program, len(options), options), "nvrtcCompileProgram")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    checked(nvrtc.nvrtcGetCUBIN(program, binary), "nvrtcGetCUBIN")

    def load() -> Kernel:
        module = checked(driver.cuModuleLoadData(binary), "cuModuleLoadData")
        return Kernel(checked(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction"), 1, 0)

    return load


def again(operation: Callable[[Tensor], Operation]) -> Callable[[Tensor], Operation]:
    """The operation done once before: nothing should wait."""

    def prepare(x: Tensor) -> Operation:
        prepared = operation(x)
        prepared()
        return prepared

    return prepare


def erfinv(x: Tensor) -> Operation:
    return lambda: torch.erfinv(x)


def second_matmul(x: Tensor) -> Operation:
    x @ x  # the library and its workspace are there
    x = x.bfloat16()
    return lambda: x @ x


def triton_kernel(x: Tensor) -> Operation:
    earlier[(1,)](x)  # the launcher, a C module, is the same for both
    return lambda: later[(1,)](x)


def nvrtc_module(x: Tensor) -> Operation:
    load = compiled(EMPTY, "empty")
    return lambda: load().launch(1, x.device, x)


def freed(x: Tensor) -> Operation:
    torch.empty(2**28, dtype=torch.uint8, device=x.device)
    return torch.cuda.empty_cache


# What is to be timed, of functions that do all else before.
OPERATIONS: dict[str, Callable[[Tensor], Operation]] = {
    "torch.erfinv": erfinv,
    "torch.erfinv, again": again(erfinv),
    "bf16 matmul, again": again(second_matmul),
    "fp32 matmul, cuBLAS's first": lambda x: lambda: x @ x,
    "bf16 matmul, cuBLAS's second": second_matmul,
    "Triton, compiled": triton_kernel,
    "NVRTC's module": nvrtc_module,
    "torch.empty, 1 GiB": lambda x: lambda: torch.empty(2**30, dtype=torch.uint8, device=x.device),
    "empty_cache": freed,
    "pin_memory, 64 MiB": lambda x: torch.zeros(2**26, dtype=torch.uint8).pin_memory,
    "Triton, from its cache": triton_kernel,
    "Triton, again": again(triton_kernel),
}


def time_one(name: str) -> float:
    """Seconds of the host in the operation, in this process, beside the kernel that spins."""
    flags = torch.zeros(2, dtype=torch.int32).pin_memory()
    beside, stream = torch.cuda.Stream(), torch.cuda.Stream()
    spin = compiled(SPIN, "spin")()
    with torch.cuda.stream(stream):
        operation = OPERATIONS[name](torch.zeros(1024, 1024, device="cuda"))
        # Memory for results and cuBLAS's workspace: a new segment is an operation of its own.
        blocks = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (2**10, 2**27)]
        del blocks
    torch.cuda.synchronize()
    with torch.cuda.stream(beside):
        spin.launch(1, torch.device("cuda"), flags, int(1000 * BOUND))
    while not int(flags[1]):
        time.sleep(1e-3)
    release = threading.Timer(DELAY, lambda: flags[0].fill_(1))
    with torch.cuda.stream(stream):
        begin = time.perf_counter()
        release.start()
        operation()
        seconds = time.perf_counter() - begin
    release.join()
    torch.cuda.synchronize()
    return seconds


def run(name: str, mode: str, cache: Path, before: Future[Any] | None) -> dict[str, Any]:
    """One row, in a process of its own; `before` is what fills Triton's cache."""
    if before is not None:
        before.result()
    environment = os.environ | {"CUDA_MODULE_LOADING": mode, "TRITON_CACHE_DIR": str(cache / mode)}
    command = [sys.executable, __file__, "--operation", name]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    row: dict[str, Any] = {"operation": name, "mode": mode}
    if found.returncode:
        return row | {"failed": found.stderr[-2000:]}
    seconds = float(found.stdout.splitlines()[-1])
    return row | {"seconds": seconds, "waits": seconds >= DELAY}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--at-once", type=int, default=6, help="processes")
    parser.add_argument("--operation", choices=OPERATIONS, help="this one, in this process")
    options = parser.parse_args()
    if options.operation:
        print(time_one(options.operation))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        started: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        for name in OPERATIONS:  # what is waited for is started first
            for mode in MODES:
                before = started["Triton, compiled", mode] if name.endswith("its cache") else None
                started[name, mode] = pool.submit(run, name, mode, Path(folder), before)
        for future in as_completed(started.values()):
            rows.append(future.result())
            print(rows[-1], flush=True)
            if options.out:
                about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
                options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    cells = {(row["operation"], row["mode"]): row for row in rows}
    print("| first | " + " | ".join(f"{mode}, s | waits" for mode in MODES) + " |\n" + "|---" * 5 + "|")
    for name in OPERATIONS:
        found = [cells[name, mode] for mode in MODES]
        print(
            f"| {name} |", *(f"{row.get('seconds', 0):.3f} | {row.get('waits', 'failed')} |" for row in found)
        )
    if failed := [row["operation"] for row in rows if "failed" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
