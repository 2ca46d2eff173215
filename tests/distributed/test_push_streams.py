"""Whether a slot could be let go of while another stream still reads it; see test_pipeline_streams."""

import functools

import pytest
import test_pipeline_streams as streams
import torch
from harness import build, iterate
from harness import ps as parallel_state
from pipeline import interleaved
from thinned import each_value
from torch.utils._pytree import tree_leaves

from megatron_mhc.pipeline import engine
from megatron_mhc.pipeline import step as pipeline_step
from megatron_mhc.pipeline.push import PushTransport


class Watch(streams.Watch):
    """Notes when each stream has last read each slot."""

    def __init__(self, clocks):
        super().__init__(clocks)
        self.slots, self.reads, self.late = {}, {}, set()  # address -> (its end, message)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        clocks = self.clocks
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, torch.Tensor) or function.is_view or not tensor.numel():
                continue
            for start, (end, message) in self.slots.items():
                if start <= tensor.data_ptr() < end:
                    clocks.now()[clocks.current] = clocks.now().get(clocks.current, 0) + 1
                    self.reads.setdefault(message, {})[clocks.current] = clocks.now()[clocks.current]
        return out

    def hold(self, message, tensor):
        start = tensor.data_ptr()
        self.slots[start] = start + tensor.numel() * tensor.itemsize, message

    def release(self, message):
        for stream, at in self.reads.pop(message, {}).items():
            if self.clocks.now().get(stream, 0) < at:
                self.late.add((message.name, stream, self.clocks.current))
        self.slots = {start: held for start, held in self.slots.items() if held[1] != message}


def race(layout, kind, mhc, spoil):
    """(readers that a release is not behind, how many messages were read in their slot) on this rank.

    None on expert-parallel ranks but the first, which do as it does.
    """
    layout.initialize()
    config = layout.config(kind, num_layers=8)
    chunks = build(layout, config, kind, mhc)
    step = functools.partial(iterate, chunks, config, count=4 * layout.ep, schedule=engine.forward_backward)
    step()
    if parallel_state.get_expert_model_parallel_rank() > 0:
        step()
        return None
    clocks = streams.Clocks()
    pipeline_step.streams_for = lambda *_: clocks
    if mhc.recompute_layer_num != "off":
        streams.watch_recompute(clocks)
    if spoil:
        streams.fused.Tape.on = lambda self, stream: clocks.on(stream)
    wait, release, read = PushTransport.wait, PushTransport.release, set()
    with Watch(clocks) as watch:

        def waited(self, message):
            tensor = wait(self, message)
            if self.pool.memory.holds(tensor):
                watch.hold(message, tensor)
            return tensor

        def released(self, message):
            read.update({message} & watch.reads.keys())
            watch.release(message)
            release(self, message)

        PushTransport.wait, PushTransport.release = waited, released
        step()
    return watch.late, len(read)


@pytest.mark.parametrize("replayed", ["off", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind, boundary", each_value(["dense", "moe_shared"], ["whole", "split"]))
def test_a_slot_is_let_go_of_behind_all_its_readers(run_ranks, kind, boundary, replayed):
    world, layout = streams.LAYOUTS[kind]
    mhc = interleaved(boundary, "fused", recompute_layer_num=replayed, pipeline_transport="push")
    found = [of_rank for of_rank in run_ranks(world, race, layout, kind, mhc, False) if of_rank]
    assert len(found) == layout.pp
    for late, read in found:
        assert not late and read >= 8


def test_a_release_that_is_not_is_noticed(run_ranks):
    world, layout = streams.LAYOUTS["moe_shared"]
    mhc = interleaved("whole", "fused", pipeline_transport="push")
    assert run_ranks(world, race, layout, "moe_shared", mhc, True)[0][0]
