"""What launches keep between calls, and in CUDA graphs; the driver is a stand-in, so any CPU will do."""

import itertools
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
    monkeypatch.setattr(launch, "_workspaces", {})
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


def test_launches_of_a_graph_keep_no_memory_and_take_none_of_a_stream(machine):
    eager = plan(1000)
    eager.launch((), ())
    machine.capturing = True
    eager.launch((), ())
    machine.stream = 7
    plan(200).launch((), ())  # made while its stream is captured
    assert machine.memsets[1][0] != machine.memsets[0][0]
    assert kept(machine) == [1024] and set(launch._workspaces) == {(0, 0)}


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
