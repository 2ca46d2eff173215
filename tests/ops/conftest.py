"""Fixtures of several files of this folder."""

import functools

import pytest
import torch
from emulator.launch import Emulator, Schedule

from megatron_mhc.ops import autograd
from megatron_mhc.ops.hopper import pre, pre_backward
from megatron_mhc.ops.kernels import HOPPER


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new floating tensors with NaN: an element that nobody writes shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(make):
        def poisoned_make(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned_make

    monkeypatch.setattr(torch, "empty", fill(empty))
    monkeypatch.setattr(torch, "empty_like", fill(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(new_empty))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hopper")


@pytest.fixture
def emulate(monkeypatch, folder):
    """`emulate(shape, ...)` puts the emulator in the GPU's place, and returns it."""

    def emulate(shape, schedule=None, bugs=None, stages=(3, 6)):
        *_, blocks, widest = shape
        emulator = Emulator(folder, schedule or Schedule(), bugs or {})
        for module, number in zip((pre, pre_backward), stages, strict=True):
            monkeypatch.setattr(module, "MOST_STAGES", number)
            monkeypatch.setattr(module, "WIDEST", min(widest, module_widest[module]))
            monkeypatch.setattr(module, "multiprocessors", lambda device: blocks)
            monkeypatch.setattr(module, "kernel", emulator.kernel)
            monkeypatch.setattr(module, "raw_stream", lambda device: 0)
            monkeypatch.setattr(module, "_plan", plans[module])
        monkeypatch.setattr(autograd, "pre", functools.partial(by_triton, kernels=HOPPER))
        return emulator

    by_triton = autograd.pre
    module_widest = {module: module.WIDEST for module in (pre, pre_backward)}
    plans = {module: module._plan.__wrapped__ for module in (pre, pre_backward)}
    return emulate
