"""Cold kernel launches beside posted messages: why a model's first step sends through the hosts.

A cold launch, the first one of a kernel, synchronises with all work that pends on the device. An H100 with
torch 2.11 did so for torch's own kernels, cuBLAS, Triton and NVRTC modules, under CUDA_MODULE_LOADING=EAGER
as under LAZY. If a receive was posted ahead, the launch waits until the sender has sent. Two ranks that
launch cold kernels behind each other's receives deadlock. So the messages of a model's first step go through
the hosts (`comm.HostTransport`).

A later step may launch a new kernel: experts of other sizes take another kernel of cuBLAS. One rank at a
time may, since its pending messages still arrive (`check.held_up`), given the default group of micro-batches
and at least 2 pp - 1 of them. Two ranks at once, fewer micro-batches or larger groups can still deadlock;
NCCL's watchdog then ends the job after --distributed-timeout-minutes.
"""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch


def pends_on_device(backend: str) -> bool:
    """Whether a message of this backend, once posted, is work that the device has not done yet."""
    return backend == "nccl"


_seen: WeakKeyDictionary[torch.nn.Module, set[Hashable]] = WeakKeyDictionary()


def first_of_its_kind(model: torch.nn.Module, kind: Hashable) -> bool:
    """Whether a model has not been asked about a step of this kind before; the same on all ranks."""
    kinds = _seen.setdefault(model, set())
    first = kind not in kinds
    kinds.add(kind)
    return first
