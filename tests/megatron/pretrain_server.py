"""Runs programs on gloo processes as torchrun would, forked from one process that has imported Megatron once.

Reads a JSON object a line: `module`, the words behind -m; `processes`; `output`, the file for all that they
print; `seconds`, after which they are killed. Prints each run's exit status.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from megatron_mhc.testing import cpu

cpu.install(pretend_cuda=True)

import megatron.training.training  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import megatron_mhc.specs  # noqa: E402, F401


def rank(number: int, processes: int, port: int, module: list[str], output: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    settings = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    os.environ |= {name: str(value) for name, value in settings.items()}
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sys.argv = ["cpu", "-m", *module]
    cpu.main()


def exit_code(process: BaseProcess) -> int | None:
    process.join()  # its files are closed, which is what was waited for; it may not have ended yet
    return process.exitcode


def run(module: list[str], processes: int, output: str, seconds: float) -> int:
    """The exit status: 0, or the first that was another one; the other ranks are then ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=rank, args=(i, processes, port, module, output)) for i in range(processes)]
    for process in ranks:
        process.start()
    until, running = time.monotonic() + seconds, {process.sentinel: process for process in ranks}
    status = 0
    while running and not status:
        ended = wait(list(running), max(0, until - time.monotonic()))
        status = next((code for s in ended if (code := exit_code(running.pop(s)))), 0 if ended else 124)
    for process in ranks:
        process.kill()
        process.join()
    return status


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
