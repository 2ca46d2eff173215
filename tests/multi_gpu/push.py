"""Pushed messages on two ranks, without a model: right, in time, and beside compute. Under torchrun.

    torchrun --nproc-per-node 2 -m multi_gpu.push --out push.json --scratch FOLDER

messages   programs of every schedule and boundary, with shapes of odd sizes and as few slots as can be:
           messages that were wrong when they came or when their slot was let go of
beside     milliseconds of a GEMM alone, while a wait pends, and while copies go both ways; GB/s of the
           copies; over NCCL, GB/s that an all-to-all and the copies have alone and beside each other
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as dist

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything else touches a GPU

from benchmarks.harness import ON_GPU, Report, Row  # noqa: E402
from megatron_mhc import MHCConfig  # noqa: E402
from megatron_mhc.pipeline import links, push  # noqa: E402
from megatron_mhc.pipeline.memory import Memory  # noqa: E402
from megatron_mhc.pipeline.push import Pool, PushTransport, Shapes  # noqa: E402
from megatron_mhc.pipeline.streams import streams_for  # noqa: E402
from megatron_mhc.schedule import lanes  # noqa: E402
from megatron_mhc.schedule.program import SPLIT, WHOLE, Plan  # noqa: E402
from megatron_mhc.testing.messages import drive  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "fused": dict(fused=True, layers=2),
    "evaluation": dict(forward_only=True),
}
PUSH = MHCConfig(pipeline_schedule="interleaved", pipeline_transport="push")


def shapes_of(tokens: int, width: int) -> Shapes:
    wide, narrow = (tokens, 1, 4 * width), (tokens, 1, width + 8)
    return {"streams": wide, "mixed": wide, "d_streams": wide, "write": narrow, "d_write": narrow}


def device() -> torch.device:
    return torch.empty(0, device="cuda").device


def gemm(size: int) -> Callable[[Any], None]:
    """Work for a program's compute operations."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)

    def work(op: Any) -> None:
        torch.mm(a, a)

    return work


def messages(pool: Pool, mode: str, boundary: str, ahead: int, options: argparse.Namespace) -> Row:
    """Drive steps of changing numbers of micro-batches and odd sizes."""
    lanes.AHEAD = ahead
    lanes.tracks.cache_clear()
    push._places.cache_clear()
    pool._known.clear()  # the same plans have other slots now
    wrong, count, work = torch.zeros((), dtype=torch.int64, device="cuda"), 0, gemm(options.gemm)
    began = time.perf_counter()
    for step, (micro, tokens, width) in enumerate(options.steps):
        plan = Plan(2, 2, micro, boundary=boundary, **MODES[mode])
        how = (shapes_of(tokens, width), torch.bfloat16, device(), streams_for(device(), dist.get_backend()))
        transport = PushTransport(plan, pool.rank, pool, *how)
        count += len(transport.at)
        wrong += drive(plan, pool.rank, transport, step, work)
    seconds, bad = time.perf_counter() - began, int(wrong)
    every: list[Any] = [None] * 2
    dist.all_gather_object(every, bad)
    slots = max(track.slots for track in transport.tracks.values())
    row: Row = {"messages": count, "wrong": sum(every), "slots at most": slots}
    return row | {"seconds": seconds, "ok": not sum(every)}


def beside(pool: Pool, options: argparse.Namespace) -> Row:
    """What copies and a pending wait cost a GEMM, in memory of its own: a count, then the payload."""
    size = options.copy
    memory: Memory = pool._make(size + 512, 4)
    peer, done = 1 - pool.rank, 0
    source = torch.full((size // 2,), pool.rank + 1.0, dtype=torch.bfloat16, device="cuda")
    work, events = gemm(options.beside), []

    def milliseconds(count: int = 20) -> float:
        events[:] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(count):
            work(None)
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / count

    def send(count: int) -> None:
        nonlocal done
        for _ in range(count):
            done += 1
            with memory.behind("forward"):
                memory.copy(peer, 512, source)
                memory.put(peer, 0, done)

    milliseconds()
    row: Row = {"GEMM alone ms": milliseconds()}
    dist.barrier()
    if memory.pends and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] != "1":
        # With one hardware queue the GEMM would stand behind this wait.
        with memory.behind("other"):
            memory.until(0, 1)
        row["a wait pends"] = milliseconds()
    dist.barrier()
    send(1)
    memory.finish(lambda: None)
    dist.barrier()
    send(20)
    row["copies both ways"] = milliseconds()
    memory.finish(lambda: None)
    dist.barrier()
    torch.cuda.synchronize()
    began = time.perf_counter()
    send(10)
    memory.until(0, done)
    memory.finish(lambda: None)
    row["GB/s each way"] = 10 * size / 1e9 / (time.perf_counter() - began)
    if ON_GPU:
        row |= beside_all_to_all(size, send, memory)
    arrived = memory.tensor(512, (size // 2,), torch.bfloat16)
    row["ok"] = bool((arrived == peer + 1.0).all())
    return row


def beside_all_to_all(size: int, send: Callable[[int], None], memory: Memory) -> Row:
    """GB/s each way of experts' all-to-alls and of copies of `size` bytes, alone and at the same time."""
    tokens = torch.zeros(size, dtype=torch.bfloat16, device="cuda")  # of which one half stays
    out, count = torch.empty_like(tokens), 30
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    copied = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def rates(exchanges: int, copies: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        dist.barrier()
        with memory.behind("forward"):
            copied[0].record()
        send(copies)
        with memory.behind("forward"):
            copied[1].record()
        ends[0].record()
        for _ in range(exchanges):
            dist.all_to_all_single(out, tokens)
        ends[1].record()
        memory.finish(lambda: None)
        torch.cuda.synchronize()
        spans = (exchanges, ends), (copies, copied)
        exchanged, sent = (n * size / 1e6 / max(a.elapsed_time(b), 1e-6) for n, (a, b) in spans)
        return exchanged, sent

    rates(3, 3)
    (alone, _), (_, copies), both = rates(count, 0), rates(0, count), rates(count, count)
    return {
        "all-to-all alone GB/s": alone,
        "beside copies": both[0],
        "copies alone GB/s": copies,
        "beside all-to-all": both[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--scratch", type=Path, required=True, help="not used")
    add("--timeout", type=int, default=60, help="of a wait, in seconds")
    add("--tiny", action="store_true", help="toy sizes, for a CPU")
    options = parser.parse_args()
    settings = {"connections": os.environ["CUDA_DEVICE_MAX_CONNECTIONS"], "tiny": options.tiny}
    options.steps = [(8, 2047, 1021), (3, 1, 1), (8, 4096, 2560), (5, 513, 2559), (8, 2047, 1021), (9, 33, 7)]
    options.gemm, options.beside, options.copy = 4096, 8192, 335 * 2**20
    if options.tiny:
        options.steps = [(4, 3, 5), (3, 1, 1), (4, 9, 7), (5, 3, 5), (4, 3, 5)]
        options.gemm, options.beside, options.copy = 8, 8, 2**12
    report = Report(options.out, "push", settings, limit=120)
    limit = timedelta(seconds=options.timeout)
    dist.init_process_group("nccl" if ON_GPU else "gloo", timeout=limit)
    faulthandler.dump_traceback_later(300, exit=True)
    group = dist.group.WORLD
    choice = links.choose(group, PUSH)
    if report.wanted("transport", "chosen"):
        report.add("transport", "chosen", {"kind": choice.kind, "why": choice.why, "ok": choice.pushes})
    pool = links.pool_of(group)
    for mode in MODES:
        for boundary in (WHOLE, SPLIT):
            for ahead in (2, 0) if mode == "evaluation" else (2, 1, 0):
                name = f"{mode}, {boundary}, {ahead} slots more than it holds"
                if report.wanted("messages", name):
                    report.add("messages", name, messages(pool, mode, boundary, ahead, options))
    if report.wanted("beside", "compute"):
        report.add("beside", "compute", beside(pool, options))
    pool.close()
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()
    report.end() if dist.get_rank() == 0 else None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
