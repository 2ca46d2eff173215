"""Run a function on several ranks, forked from this process: over gloo, or over NCCL with a GPU for each.

A fork costs milliseconds where torchrun pays for imports on every rank. It is safe while this process
has neither touched CUDA nor started threads of its own that hold locks.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

backend = "gloo"  # of all ranks; or nccl


class RankError(RuntimeError):
    """A rank failed; the message holds its number and traceback."""


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `fn(*args)` on `world` ranks and return the results in order of rank.

    Args:
        world: number of processes, which share a process group.
        fn: any callable; the fork hands it over without pickling. Tensors in its result come on the CPU.
        timeout: seconds for all of it, and for each collective.

    Raises:
        RankError: a rank raised, died, or was still running at the timeout; its peers are killed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        store = os.path.join(folder, "store")
        processes, pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            # Not daemonic: a checkpoint's save starts processes of its own.
            process = context.Process(target=_rank, args=(rank, world, store, timeout, theirs, fn, args))
            process.start()
            theirs.close()  # so that a dead rank reads as end of file
            processes.append(process)
            pipes.append(ours)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            # After an error the peers hang in a collective: they get no time to leave it.
            for process in processes:
                _stop(process)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, max(0.0, deadline - time.monotonic()))
        if not ready:
            running = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankError(f"ranks {running} are not done at the timeout")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                failed, payload = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without an answer") from None
            if failed:
                raise RankError(f"rank {rank}:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), "cpu", weights_only=False)
    for pipe in pipes:
        pipe.send(None)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world: int, store: str, timeout: float, pipe: Connection, fn: Callable[..., Any], args: Any
) -> None:
    os.setsid()  # its own group, so that its children can be killed along with it
    for name, value in {"RANK": rank, "WORLD_SIZE": world}.items():
        os.environ[name] = os.environ["LOCAL_" + name] = str(value)
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
        )
        result = io.BytesIO()
        # By value: a tensor sent through a pipe as such lives in this process's shared memory.
        torch.save(fn(*args), result)
        pipe.send((False, result.getvalue()))
        pipe.poll(timeout)  # until all are done: a rank that leaves closes its sockets under its peers
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # the parent's exit handlers and test teardown are not this process's


def _stop(process: Any) -> None:
    process.join(0.5)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.join()
