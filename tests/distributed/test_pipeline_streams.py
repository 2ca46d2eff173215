"""Whether CUDA streams could race in a fused step: every read is behind the write, and keeps its memory.

Runs on a CPU, in the order of the host. A dispatch mode notes on which stream each operation would run and
what it reads and writes; events carry vector clocks.
"""

import contextlib
import functools
import itertools

import delayed
import pytest
import torch
import torch.distributed as dist
from harness import Layout, build, iterate
from pipeline import interleaved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mhc.pipeline import comm, delayed_weights, engine, fused, layer_nodes
from megatron_mhc.pipeline import step as pipeline_step
from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.recompute import block, sublayer
from megatron_mhc.schedule.streams import COMPUTE_STREAM
from megatron_mhc.testing import cpu


class Clocks(HostStreams):
    """Streams that run nothing, and know what has happened before the next operation of each."""

    def __init__(self):
        self.current, self.time = COMPUTE_STREAM, {}
        self.written, self.home, self.users, self.alive = {}, {}, {}, []

    def now(self):
        return self.time.setdefault(self.current, {})

    @contextlib.contextmanager
    def switch(self, name):
        before, self.current = self.current, name
        yield
        self.current = before

    def posting(self):
        return self.switch("posting")

    @contextlib.contextmanager
    def on(self, name, after=None):
        # Like torch.cuda.stream(None): "compute" is whatever stream is current.
        with self.switch(self.current if name == COMPUTE_STREAM else name):
            for stream, at in (after or {}).items():
                self.now()[stream] = max(at, self.now().get(stream, 0))
            yield self

    def record(self):
        return dict(self.now())

    def used(self, tensor):
        self.users.setdefault(key(tensor), set()).add(self.current)

    def write(self, tensor):
        if key(tensor) not in self.home:
            self.alive.append(tensor.untyped_storage())  # or its key would come again
            self.home[key(tensor)] = self.current
        self.now()[self.current] = self.now().get(self.current, 0) + 1
        self.written[key(tensor)] = self.current, self.now()[self.current]


def key(tensor):
    return tensor.untyped_storage()._cdata


class Watch(TorchDispatchMode):
    """Notes the operations that would race; what was there before is nobody's."""

    def __init__(self, clocks):
        super().__init__()
        self.clocks, self.early, self.unsafe = clocks, set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        clocks = self.clocks
        out = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for tensor in inputs:
            # Single numbers: Megatron has the sizes of an all-to-all on the host.
            if key(tensor) not in clocks.home or function.is_view or tensor.dim() == 0:
                continue
            stream, at = clocks.written[key(tensor)]
            note = str(function), tuple(tensor.shape), stream, clocks.current
            if clocks.now().get(stream, 0) < at:
                self.early.add(note)
            users = clocks.users.get(key(tensor), set()) | {clocks.home[key(tensor)]}
            if clocks.current not in users:
                self.unsafe.add(note)
        seen = {key(tensor) for tensor in inputs}
        for argument, tensor in zip(function._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(tensor, torch.Tensor) and key(tensor) in clocks.home:
                clocks.write(tensor)
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if key(tensor) not in seen:
                clocks.write(tensor)
        return out


class Stream(cpu._Stream):
    """What `recompute` asks of a CUDA stream."""

    device = None

    def __init__(self, clocks):
        self.clocks, self.name = clocks, clocks.current

    def __eq__(self, other):
        return self.name == getattr(other, "name", None)

    def record_event(self, event=None):
        return dict(self.clocks.time.get(self.name, {}))

    def wait_event(self, event):
        with self.clocks.on(self.name, event):
            pass


def watch_recompute(clocks):
    for module in (block, sublayer):
        module.stream_of = lambda tensor: Stream(clocks)
        module.used_on = lambda stream, tensor: clocks.users.setdefault(key(tensor), set()).add(stream.name)
    torch.cuda.current_stream = lambda device=None: Stream(clocks)
    refill = block.Emptied.refill

    def refilled(self):
        tensor = refill(self)
        clocks.home[key(tensor)], clocks.users[key(tensor)] = clocks.current, set()
        return tensor

    block.Emptied.refill = refilled


def race(layout, kind, mhc, spoil, late=False, count=4, **settings):
    """Reads before their writes, and of memory that may be gone, on rank 0; the others only run with it.

    Args:
        late: delay weight gradients.
    """
    layout.initialize()
    config = layout.config(kind, **dict(num_layers=8) | settings)
    chunks = (delayed.build if late else build)(layout, config, kind, mhc)
    step = functools.partial(
        iterate, chunks, config, count=count * layout.ep, schedule=engine.forward_backward
    )
    step()
    if dist.get_rank() > 0:
        return step()
    clocks = Clocks()
    pipeline_step.streams_for = lambda *_: clocks
    if mhc.recompute_layer_num != "off":
        watch_recompute(clocks)
    wait = comm.GroupTransport.wait

    def waited(self, message):
        tensor = wait(self, message)
        clocks.write(tensor)  # what comes in is there once the current stream has waited
        return tensor

    comm.GroupTransport.wait = waited
    if spoil == "events":
        fused.Tape.on = lambda self, stream: clocks.on(stream)
    if spoil == "memory":
        layer_nodes.NodeByNode._reads = lambda *_: None
    if spoil == "bias":
        delayed_weights.DelayedWeights._used = lambda *_: None
    with Watch(clocks) as watch:
        step()
    beside = {"posting", "all-to-all" if kind.startswith("moe") else "posting"}
    assert beside <= set(clocks.home.values())
    return watch.early, watch.unsafe


# Rank 0 has no last stage: a loss goes backward on its own stream under CUDA, and not here.
LAYOUTS = {"dense": (2, Layout(pp=2, vpp=2)), "moe_shared": (4, Layout(pp=2, vpp=2, ep=2))}


DEFAULT = {("dense", "whole", "off"), ("dense", "split", "auto")}
DEFAULT |= {("moe_shared", "whole", "auto"), ("moe_shared", "split", "off")}


@pytest.mark.parametrize(
    "kind, boundary, replayed",
    [
        pytest.param(*case, marks=[] if case in DEFAULT else pytest.mark.slow)
        for case in itertools.product(("dense", "moe_shared"), ("whole", "split"), ("off", "1", "auto"))
    ],
)
def test_no_stream_reads_what_may_not_be_there(run_ranks, kind, boundary, replayed):
    world, layout = LAYOUTS[kind]
    mhc = interleaved(boundary, "fused", recompute_layer_num=replayed)
    early, unsafe = run_ranks(world, race, layout, kind, mhc, None)[0]
    assert not early
    # What a replay brings back is let go by the attention's piece, which comes after all other readers.
    assert replayed != "off" or not unsafe


@pytest.mark.parametrize("boundary", [pytest.param("whole", marks=pytest.mark.slow), "split"])
def test_nor_where_megatron_lends_one_buffer_to_all(run_ranks, boundary):
    """The allgather dispatcher's gather beside those of linears under sequence parallelism."""
    layout, mhc = Layout(pp=2, vpp=2, tp=2, sp=True), interleaved(boundary, "fused")
    run = functools.partial(race, moe_token_dispatcher_type="allgather", moe_layer_freq=[0, 1, 1, 1] * 2)
    early, unsafe = run_ranks(4, run, layout, "moe_shared", mhc, None)[0]
    assert not early and not unsafe


@pytest.mark.parametrize(
    "kind, boundary",
    [
        ("dense", "whole"),
        ("moe_shared", "split"),
        pytest.param("dense", "split", marks=pytest.mark.slow),
        pytest.param("moe_shared", "whole", marks=pytest.mark.slow),
    ],
)
def test_nor_do_delayed_weight_gradients(run_ranks, kind, boundary):
    world, layout = LAYOUTS[kind]
    early, unsafe = run_ranks(world, race, layout, kind, interleaved(boundary, "fused"), None, True)[0]
    assert not early and not unsafe


@pytest.mark.parametrize("spoil", [None, "bias"])
def test_a_bias_that_post_res_adds_keeps_its_gradient(run_ranks, spoil):
    """Its gradient is made on the stream of post_res, and taken where the weight's is."""
    small = dict(num_layers=2, params_dtype=torch.float32, count=2)
    run = functools.partial(race, late=True, **small)
    mhc = interleaved("whole", "fused", backend="triton", sinkhorn_iterations=1)
    early, unsafe = run_ranks(2, run, Layout(pp=2), "biased", mhc, spoil)[0]
    assert not early
    assert bool(unsafe) == (spoil is not None)


@pytest.mark.parametrize("boundary, spoil", [("whole", "memory"), ("split", "events")])
def test_a_race_is_noticed(run_ranks, boundary, spoil):
    world, layout = LAYOUTS["moe_shared"]
    early, unsafe = run_ranks(world, race, layout, "moe_shared", interleaved(boundary, "fused"), spoil)[0]
    assert early if spoil == "events" else unsafe
