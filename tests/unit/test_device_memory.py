"""What `device_memory` asks of the driver, by a stand-in that does it at once, on hosts' memory."""

import ctypes
import types

import pytest
import torch

from megatron_mhc.pipeline import device_memory
from megatron_mhc.pipeline.memory import WRAP
from megatron_mhc.testing import cpu


class Stream(cpu._Stream):
    made = 0

    def __init__(self, *_, **__):
        Stream.made += 1
        self.cuda_stream = Stream.made

    @staticmethod
    def priority_range():
        return 0, -1


class Driver:
    """Streams are numbers; every operation is noted and done."""

    def __init__(self):
        self.asked = []

    def _note(self, name, stream):
        self.asked.append((name, stream))
        return (0,)

    def cuStreamWaitValue32(self, stream, address, value, flags):
        assert 0 <= value < WRAP and flags == 0
        assert (ctypes.c_uint32.from_address(address).value - value) % WRAP < WRAP // 2, "would wait"
        return self._note("wait", stream)

    def cuStreamWriteValue32(self, stream, address, value, flags):
        assert flags == 0
        ctypes.c_uint32.from_address(address).value = value
        return self._note("write", stream)

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)
        return self._note("copy", stream)

    cuMemcpyDtoHAsync = cuMemcpyDtoDAsync


@pytest.fixture
def memory(monkeypatch):
    """Rank 0 of two, whose memories lie in this process."""
    driver, ranks = Driver(), []

    def empty(size, stride, dtype, device):
        ranks[:] = [torch.ones(size, dtype=dtype) for _ in range(2)]
        return ranks[0]

    def rendezvous(own, group):
        assert own is ranks[0] and device_memory.os.environ[device_memory.NO_MULTICAST] == "1"
        assert not own.any()  # zero, for others may write from here on
        return types.SimpleNamespace(get_buffer=lambda rank, size, dtype: ranks[rank])

    monkeypatch.delenv(device_memory.NO_MULTICAST, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p", empty)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", rendezvous)
    monkeypatch.setattr("cuda.bindings.driver", driver, raising=False)
    group = types.SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    made = device_memory.DeviceMemory(group, 1024, 8)
    assert device_memory.NO_MULTICAST not in device_memory.os.environ
    made.other = ranks[1].zero_()
    return made


def test_a_message_goes_to_the_other_ranks_memory(memory):
    data = torch.arange(12, dtype=torch.float32)
    with memory.behind("forward") as stream:
        memory.put(1, 256, 7)
        memory.copy(1, 512, data)
        memory.note(3, WRAP + 9)
    assert memory.other[512:560].view(torch.float32).tolist() == data.tolist()
    assert memory.other[256:260].view(torch.int32).item() == 7 and not memory._own.any()
    assert memory.noted(3) == 9 and memory.noted_from(2, 3) == [0, 9, 0]
    assert memory.stream("forward") is stream is not memory.stream("beside")


def test_what_came_is_there_and_a_count_may_wrap_around(memory):
    memory.put(0, 128, WRAP - 1)
    memory.until(128, WRAP - 1)
    memory.until(128, -1)
    memory.put(0, 128, 1)
    memory.until(128, WRAP - 1)
    with pytest.raises(AssertionError, match="would wait"):
        memory.until(128, 2)
    memory.note_word(5, 128)
    assert memory.noted(5) == 1
    memory._own[256:296] = 1
    came = memory.tensor(256, (2, 5), torch.float32)
    assert came.shape == (2, 5) and came._base is None and memory.holds(came)
    assert not memory.holds(torch.zeros(3))


def test_a_driver_that_fails_says_at_what(memory):
    memory._driver.cuStreamWaitValue32 = lambda *_: (801,)
    with pytest.raises(RuntimeError, match="cuStreamWaitValue32 failed"):
        memory.until(0, 0)


def test_the_host_looks_at_the_clock_while_it_waits(memory):
    asked = []
    memory.finish(lambda: asked.append(1))
    assert asked
    with memory.aside() as stream:
        assert stream is memory._free
