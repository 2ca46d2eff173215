"""Whether the two CUDA streams of Megatron's combined 1F1B could race in what mHC adds to its nodes.

As in test_pipeline_streams.py: on a CPU, in the order of the host, with clocks instead of streams.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from harness import Layout, build, iterate
from megatron.core.pipeline_parallel import utils
from test_pipeline_streams import Clocks, Stream, Watch, key, watch_recompute
from torch.utils._pytree import tree_leaves

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import combined_nodes


class Event:
    def __init__(self, clocks):
        self.clocks, self.at = clocks, {}

    def record(self, stream):
        self.at = dict(self.clocks.time.get(stream.name, {}))

    def wait(self, stream):
        with self.clocks.on(stream.name, self.at):
            pass


def watch_cuda(clocks, spoil):
    """Have torch.cuda's streams and events be the clocks'."""

    @contextlib.contextmanager
    def stream(of):
        # Of a dispatcher's copies to the host, which it waits for, there is no clock.
        with clocks.switch(getattr(of, "name", clocks.current)):
            yield

    def make(*args, **kwargs):
        with clocks.switch("communication"):
            return Stream(clocks)

    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = make, lambda: Event(clocks), stream
    torch.cuda.current_stream = lambda device=None: Stream(clocks)
    torch.Tensor.record_stream = lambda self, of: clocks.users.setdefault(key(self), set()).add(of.name)
    utils._COMM_STREAM = None
    if spoil == "events":
        Event.wait = lambda self, stream: None
    if spoil == "memory":
        combined_nodes._used = lambda *_: None


class WatchToTheEnd(Watch):
    """A tensor may be told of a stream that reads it behind the read: what counts is that it is alive."""

    def __init__(self, clocks):
        super().__init__(clocks)
        self.reads = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        home, current = self.clocks.home, self.clocks.current
        for tensor in (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)):
            if key(tensor) in home and not function.is_view and tensor.dim():
                self.reads.append(
                    (key(tensor), (str(function), tuple(tensor.shape), home[key(tensor)], current))
                )
        return super().__torch_dispatch__(function, types, args, kwargs)

    def never_told(self):
        """Reads of memory of another stream, which was never told of them."""
        clocks = self.clocks
        return {
            note
            for storage, note in self.reads
            if note[-1] not in clocks.users.get(storage, set()) | {clocks.home[storage]}
        }


def race(layout, mhc, spoil=None):
    """What Watch notes on rank 0 of two: reads before their writes, and of memory that may be gone."""
    layout.initialize()
    config = layout.config("moe_shared", num_layers=3, moe_layer_freq=[0, 1, 1])
    config.overlap_moe_expert_parallel_comm = True
    chunks = build(layout, config, "moe_shared", mhc)
    iterate(chunks, config)
    if dist.get_rank() > 0:
        return iterate(chunks, config)
    clocks = Clocks()
    if mhc is not None and mhc.recompute_layer_num != "off":
        watch_recompute(clocks)
    watch_cuda(clocks, spoil)
    with WatchToTheEnd(clocks) as watch:
        iterate(chunks, config)
    assert {"compute", "communication"} <= set(clocks.home.values())
    return watch.early, watch.never_told()


def raced(run_ranks, *case):
    return run_ranks(2, race, Layout(ep=2), *case)[0]


@pytest.mark.parametrize("replayed", ["off", "3"])
def test_no_stream_reads_what_may_not_be_there(run_ranks, replayed):
    early, unsafe = raced(run_ranks, MHCConfig(recompute_layer_num=replayed))
    assert not early
    theirs = {(name, len(shape)) for name, shape, *_ in unsafe}
    assert theirs <= {("aten.cat.default", 1), ("aten.mm.default", 2)}
    # Megatron's own nodes are as free with those, and with more.
    early, unsafe = raced(run_ranks, None)
    assert not early
    assert theirs <= {(name, len(shape)) for name, shape, *_ in unsafe}


@pytest.mark.parametrize("spoil", ["memory", "events"])
def test_a_race_is_noticed(run_ranks, spoil):
    early, unsafe = raced(run_ranks, MHCConfig(), spoil)
    assert early if spoil == "events" else {shape for _, shape, *_ in unsafe if len(shape) == 3}
