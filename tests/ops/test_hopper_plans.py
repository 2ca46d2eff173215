"""What launches keep between calls, and in CUDA graphs; the driver is a stand-in, so any CPU will do."""

import contextlib
import gc
import itertools
import sys
import threading
import time
import types
import weakref

import pytest
import torch

from megatron_mhc.ops.hopper import compile as hopper
from megatron_mhc.ops.hopper import launch, pre, pre_backward
from megatron_mhc.ops.options import Options

OPTIONS = Options(1e-6, 20, False, 0)
BOX = launch.Box(16, 4, 64, 64, 4, 16)


@pytest.fixture
def machine(monkeypatch):
    """One device: the current stream, whether it is captured, and every workspace that was allocated."""
    now = types.SimpleNamespace(stream=0, capturing=False, memsets=[], workspaces=[])

    def empty(device, floats):
        workspace = torch.empty(floats)
        now.workspaces.append(weakref.ref(workspace))
        return workspace

    def memset(address, value, nbytes, stream):
        now.memsets.append((address, nbytes, stream))
        return 0

    driver = types.SimpleNamespace(cuMemsetD8Async=memset, cuLaunchKernel=lambda *_: 0)
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(launch, "_empty", empty)
    monkeypatch.setattr(launch, "_workspaces", launch._Workspaces())
    monkeypatch.setattr(launch, "raw_stream", lambda device: now.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: now.capturing, raising=False)
    monkeypatch.setattr(
        launch.Box, "tensor_map", lambda box, address: types.SimpleNamespace(getPtr=lambda: address)
    )
    return now


def plan(*workspace, boxes=()):
    return launch.Plan(0, 128, 0, 132, boxes, workspace, ())


def kept(machine):
    """Floats of the workspaces that are still there."""
    return [len(workspace()) for workspace in machine.workspaces if workspace() is not None]


def test_launches_of_a_stream_share_one_workspace(machine):
    small, large = plan(100, 100), plan(1000)
    for one in (small, large, small, large):
        one.launch((), ())
    assert kept(machine) == [1024] and len({address for address, _, _ in machine.memsets[1:]}) == 1
    assert [nbytes for _, nbytes, _ in machine.memsets] == [4 * 256, 4 * 1024] * 2
    machine.stream = 7
    plan(100).launch((), ())
    assert sorted(kept(machine)) == [128, 1024] and machine.memsets[-1][2] == 7


def test_threads_that_launch_on_one_stream_share_no_workspace(machine):
    """One may clear between the other's clearing and its kernel: autograd's thread, beside a forward pass."""
    step = threading.Barrier(2, timeout=10)

    def run():
        one = plan(1000)
        one.launch((), ())
        step.wait()  # both threads are alive, so they have different idents
        one.launch((), ())
        step.wait()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    addresses = [address for address, _, _ in machine.memsets]
    assert len(addresses) == 4 and len(set(addresses)) == 2
    del threads, thread
    gc.collect()
    assert kept(machine) == []  # of threads that have ended


def test_threads_that_ask_at_once_compile_a_program_once(machine, monkeypatch):
    compiled, start = [], threading.Barrier(4, timeout=10)

    def compile_slowly(path, **defines):
        compiled.append(defines["WIDTH"])
        time.sleep(0.05)
        return b"binary"

    driver = types.SimpleNamespace(
        cuModuleLoadData=lambda binary: (0, len(compiled)),
        cuModuleGetFunction=lambda module, name: (0, module),
        cuFuncSetAttribute=lambda *args: (0,),
        CUfunction_attribute=types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=0),
    )
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(hopper, "cubin", compile_slowly)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(hopper, "checked", lambda result, what: result[-1])
    source, functions = hopper.Source(pre.SOURCE.path, THREADS=32), []

    def ask():
        start.wait()
        functions.extend(hopper.kernel(source, 0, 1024, WIDTH=width).function for width in (64, 128))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compiled) == [64, 128] and sorted(functions) == [1] * 4 + [2] * 4


def test_launches_of_a_graph_keep_no_memory_and_take_none_of_a_stream(machine):
    eager = plan(1000)
    eager.launch((), ())
    machine.capturing = True
    eager.launch((), ())
    machine.stream = 7
    plan(200).launch((), ())  # made while its stream is captured
    assert machine.memsets[1][0] != machine.memsets[0][0]
    assert kept(machine) == [1024] and set(launch._workspaces.of) == {(0, 0)}


def test_tensor_maps_are_bounded(machine):
    one = plan(boxes=(BOX, BOX))
    for address in range(64, 64 + 5 * launch._MOST_MAPS):
        one.launch([types.SimpleNamespace(data_ptr=lambda at=at: at) for at in (address, 2 * address)], ())
        assert len(one._kept) <= 2 * launch._MOST_MAPS
        assert sum(map(len, one._maps)) <= 2 * launch._MOST_MAPS
        assert list(one._places[:2]) == [address, 2 * address]


@pytest.mark.parametrize("channels", [512, 2048, 2560, 7168])
def test_a_thousand_lengths_of_sequences_make_few_kernels_and_plans(machine, monkeypatch, channels):
    compiled = set()

    def kernel(source, device, shared, **defines):
        compiled.add((source.path.name, shared, *sorted(defines.items())))
        return hopper.Kernel(0, source.constants["THREADS"], shared)

    for module in (pre, pre_backward):
        module._plan.cache_clear()
        monkeypatch.setattr(module, "kernel", kernel)
    for tokens in itertools.chain(range(1, 500), range(500, 66000, 131)):
        for module, flag in itertools.product((pre, pre_backward), (False, True)):
            made = module._plan(tokens, channels, OPTIONS, flag, None, False, 0, 132, 0, 0)
            made.launch([types.SimpleNamespace(data_ptr=lambda: 64)] * len(made._boxes), ())
    assert len(compiled) <= 4 * 4
    assert len(kept(machine)) == 1 and kept(machine)[0] * 4 < 8 * 2**20
    for module in (pre, pre_backward):
        assert module._plan.cache_info().currsize <= 64
        module._plan.cache_clear()
    assert hopper._layout.cache_info().currsize <= 256
