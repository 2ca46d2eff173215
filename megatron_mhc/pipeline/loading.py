"""Kernels that are loaded while a message is pending, and what keeps two ranks from waiting for each other.

CUDA loads a kernel when it is first launched, unless CUDA_MODULE_LOADING=EAGER, and loading may have to wait
until the device has done all that it was given. Given a receive that was posted ahead, that is when the
sender has sent; if its host stands in such a launch too, both wait for ever. On two H100s the first step of
`interleaved` did so.

EAGER has CUDA load the kernels of libraries (torch, cuBLAS, Transformer Engine) at the start of the process,
among them those that only a later step chooses. The modules of Triton and NVRTC come at their first call in
any case: therefore the messages of a model's first step go by way of the hosts, see `comm.HostTransport`.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from megatron_mhc.config import flag

VARIABLE, EAGER = "CUDA_MODULE_LOADING", "EAGER"


def pends_on_device(backend: str) -> bool:
    """Whether a message of this backend, once posted, is work that the device has not done yet."""
    return backend == "nccl"


def check_loading(schedule: str, pp_group: Any) -> None:
    """Refuse to load kernels at their first launch where messages pend on the device.

    Args:
        schedule: --mhc-pipeline-schedule.
        pp_group: the pipeline's process group; None where there is none yet.

    Raises:
        ValueError: naming the flag, the value found and the remedy.
    """
    if pp_group is None or not pends_on_device(dist.get_backend(pp_group)):
        return
    if (value := os.environ.get(VARIABLE)) != EAGER:
        found = f"{VARIABLE}={value}" if value else f"{VARIABLE} unset, which means LAZY"
        raise ValueError(
            f"{flag('pipeline_schedule')} {schedule} over NCCL with {found}: the first launch of a kernel "
            "can then wait for a message whose sender waits in the same way, and the step would hang; put "
            f"`export {VARIABLE}={EAGER}` into the launch script, or use {flag('pipeline_schedule')} megatron"
        )


_seen: WeakKeyDictionary[torch.nn.Module, set[Hashable]] = WeakKeyDictionary()


def first_of_its_kind(model: torch.nn.Module, kind: Hashable) -> bool:
    """Whether a model has not been asked about a step of this kind before; the same on all ranks."""
    kinds = _seen.setdefault(model, set())
    first = kind not in kinds
    kinds.add(kind)
    return first
