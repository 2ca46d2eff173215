"""Kernels that are loaded while a message is pending, and what keeps two ranks from waiting for each other.

The first launch of a kernel waits until the device has done all that it was given (measured on an H100 with
torch 2.11: torch's own kernels, cuBLAS, Triton, compiled or cached, and NVRTC modules, under
CUDA_MODULE_LOADING=EAGER just as under LAZY). Given a receive that was
posted ahead, that is when the sender has sent; if its host stands in such a launch too, both wait for ever.
On two H100s the first step of `interleaved` did so. Therefore the messages of a model's first step go by way
of the hosts, see `comm.HostTransport`.

A later step may launch something new (experts of other sizes: another kernel of cuBLAS). One rank at a time
may: its pending messages come even so (`check.held_up`), given the default group of micro-batches and at
least 2 pp - 1 of them. Two ranks in it at the same time, fewer micro-batches or larger groups can still hang;
NCCL's watchdog ends the job after --distributed-timeout-minutes.
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
