"""Weight gradients that the linears of a fused step put off: that all are there, and where they are made."""

import functools
import itertools
from collections import Counter
from types import SimpleNamespace

import delayed
import pytest
import torch
from harness import Layout, build, differences, iterate
from pipeline import BOUNDARIES, ERROR, interleaved, overlap, pipeline_rank, reference_of
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import comm, engine
from megatron_mhc.pipeline.delayed_weights import DelayedWeights
from megatron_mhc.pipeline.step import observers
from megatron_mhc.schedule import program
from megatron_mhc.schedule.program import Op
from megatron_mhc.testing import ranks


def timers():
    """Megatron's, which may not be started twice, and the names of those that run."""
    running = []

    def start(name):
        assert name not in running
        running.append(name)

    def timer(name, **_):
        return SimpleNamespace(start=lambda **_: start(name), stop=lambda: running.remove(name))

    return timer, running


def compare(layout, kind, mhc, count, expected, overrides=None, ddp=None, prepare=None, accumulate=False):
    """One iteration with delayed weight gradients: how it differs, and how many each linear computed."""
    layout.initialize()
    config = layout.config(kind, **(overrides or {}))
    delayed.Delayed.fused_accumulation = accumulate
    chunks = delayed.build(layout, config, kind, mhc, ddp)
    if prepare:
        prepare(config, chunks)
    config.timers, running = timers()
    del delayed.events[:]
    loss = iterate(chunks, config, count=count, schedule=engine.forward_backward)
    assert running == []
    ran = Counter(linear for _, linear, _ in delayed.events)
    times = {
        n: ran[m] for chunk in chunks for n, m in chunk.named_modules() if isinstance(m, delayed.Delayed)
    }
    return differences(loss, chunks, expected, config.params_dtype), times


def check(run_ranks, world, layout, kind, boundary, count=4, layers=4, **options):
    """Against one process, whose linears delay nothing."""
    mhc = interleaved(boundary, "fused", **options.pop("mhc", {}))
    expected = reference_of(kind, MHCConfig(mtp=mhc.mtp), count, layers)
    overrides = dict(num_layers=layers) | options.pop("overrides", {})
    run = functools.partial(compare, overrides=overrides, **options)
    pipelines = world // layout.pp
    for result, times in run_ranks(world, run, layout, kind, mhc, count, expected):
        assert set(times.values()) == {count // pipelines}, times
        error, name = result.worst
        assert result.loss <= ERROR
        assert error <= ERROR, name
    return times


@pytest.mark.parametrize("vpp, boundary", each_value([None, 2], BOUNDARIES))
def test_gradients_of_dense_layers(run_ranks, vpp, boundary):
    check(run_ranks, 2, Layout(pp=2, vpp=vpp), "dense", boundary, count=5)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_of_experts_on_two_ranks(run_ranks, boundary):
    check(run_ranks, 4, Layout(pp=2, vpp=2, ep=2), "moe_shared", boundary, count=6, layers=8)


SETTINGS = {
    "biased": ("biased", {}),
    "mla": ("mla", {}),
    "tied": ("tied", {}),
    "mtp": ("mtp", {}),
    "mtp_moe": ("mtp_moe", {}),
    "mtp_between_streams": ("mtp2", dict(mhc=dict(mtp="multistream"))),
    "dense_first": ("moe_after_dense", {}),
    "replayed": ("moe_shared", dict(mhc=dict(recompute_layer_num="auto", recompute_coefficients=True))),
    "recompute": (
        "moe_shared",
        dict(
            overrides=dict(
                recompute_granularity="selective",
                recompute_modules=["core_attn", "layernorm", "shared_experts"],
            )
        ),
    ),
    "recompute_mlp": (
        "dense",
        dict(overrides=dict(recompute_granularity="selective", recompute_modules=["mlp"])),
    ),
    "distributed_optimizer": ("dense", dict(distributed=True)),
    "fused_accumulation": ("moe_shared", dict(accumulate=True)),
}
FAST = list(zip(("biased", "mtp_moe", "replayed", "fused_accumulation"), 2 * BOUNDARIES, strict=True))


@pytest.mark.parametrize(
    "setting, boundary",
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product(SETTINGS, BOUNDARIES)
    ],
)
def test_setting(run_ranks, setting, boundary):
    kind, options = SETTINGS[setting]
    layout = Layout(pp=2, vpp=2, distributed_optimizer=options.get("distributed", False))
    options = {name: value for name, value in options.items() if name != "distributed"}
    of_last_rank = check(run_ranks, 2, layout, kind, boundary, **options)
    assert any(".mtp." in name for name in of_last_rank) == kind.startswith("mtp")


@pytest.mark.parametrize("align, accumulate", each_value([False, True], [False, True]))
def test_overlapped_gradient_reduction(run_ranks, align, accumulate):
    """A bucket goes out by itself, and only once its delayed gradients are in it."""
    check(
        run_ranks,
        4,
        Layout(pp=2, vpp=2),
        "dense",
        "whole",
        count=6,
        prepare=functools.partial(overlap, align),
        ddp=dict(overlap_grad_reduce=True, bucket_size=4000),
        accumulate=accumulate,
    )


FREQUENCY = [0, 1, 1, 1, 1, 0, 1, 1]  # of four stages of two layers: a dense layer below, none, above, none


def trace(layout, mhc, count):
    """What this rank did in a step, in order, and its delayed linears.

    An event is an operation, ("sent", message), ("all-to-all",) or ("dw", linear, the operation that queued
    it); a linear is (stage, local layer, name in that layer).
    """
    layout.initialize()
    config = layout.config("moe_shared", num_layers=8, moe_layer_freq=FREQUENCY)
    chunks = delayed.build(layout, config, "moe_shared", mhc)
    linears = {}
    for at, chunk in enumerate(chunks):
        for name, module in chunk.module.decoder.layers.named_modules():
            if isinstance(module, delayed.Delayed):
                layer, _, part = name.partition(".")
                linears[module] = at * layout.pp + pipeline_rank(), int(layer), part
    exchange, send = torch.distributed.all_to_all_single, comm.GroupTransport.send

    def watched_exchange(*args, **kwargs):
        delayed.events.append(("all-to-all",))
        return exchange(*args, **kwargs)

    def watched_send(self, message, tensor):
        send(self, message, tensor)
        delayed.events.append(("sent", message))

    def observe(op, step):
        delayed.tag[:] = [op]
        delayed.events.append(op)

    torch.distributed.all_to_all_single, comm.GroupTransport.send = watched_exchange, watched_send
    observers[:] = [observe]
    iterate(chunks, config, count=count * layout.ep, schedule=engine.forward_backward)
    events = [("dw", linears[e[1]], e[2]) if e[0] == "dw" else e for e in delayed.events]
    return events, sorted(linears.values())


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_each_is_computed_behind_the_communication_that_follows_it(run_ranks, boundary):
    count, mhc = 3, interleaved(boundary, "fused")
    for events, linears in run_ranks(4, trace, Layout(pp=2, vpp=2, ep=2), mhc, count):
        computed = []
        op = started = None  # the last operation; the last thing but weight gradients
        for event in events:
            if event[0] != "dw":
                op = event if isinstance(event, Op) else op
                started = event
                continue
            _, (stage, layer, part), queued = event
            computed.append((queued.microbatch, *event[1]))
            node = "attention" if part.startswith(("self_attention", "mlp.shared_experts")) else "experts"
            assert queued == Op(program.BACKWARD, node, queued.microbatch, stage, layer)
            if part.startswith("mlp.experts"):
                assert started == ("all-to-all",)
                assert op == queued._replace(what="dispatch")
            elif layer > 0 and FREQUENCY[2 * stage + layer - 1]:
                assert started == ("all-to-all",)
                assert op == queued._replace(what="combine", layer=layer - 1)
            elif stage > 0:
                assert started == ("sent", program.Message("d_streams", queued.microbatch, stage))
            else:
                assert op == Op(program.BACKWARD, "attention", queued.microbatch, 0, 0)
        # Every linear's, once for each micro-batch.
        assert sorted(computed) == sorted((mb, *linear) for mb in range(count) for linear in linears)


def forget(layout, mhc, expected, quietly):
    """Leave out one linear's on rank 0."""
    compute = DelayedWeights.compute

    def forgetful(self):
        kept, forgotten = self._linears, "layers.1.mlp.linear_fc1"
        if pipeline_rank() == 0:
            self._linears = [pair for pair in kept if not pair[0].endswith(forgotten)]
        compute(self)
        self._linears = kept

    DelayedWeights.compute = forgetful
    if quietly:
        DelayedWeights.check_computed = lambda self: None
    return compare(layout, "dense", mhc, 3, expected, dict(num_layers=4))[0].worst


def test_one_that_is_forgotten_ends_the_step(run_ranks):
    expected = reference_of("dense", MHCConfig(), 3, 4)
    case = Layout(pp=2), interleaved("whole", "fused"), expected
    with pytest.raises(ranks.RankError, match=r"without the weight gradients of \S*layers.1.mlp.linear_fc1$"):
        run_ranks(2, forget, *case, False)
    # Without that look at the queues the gradients would be wrong.
    error, name = run_ranks(2, forget, *case, True)[0]
    assert name == "decoder.layers.1.mlp.linear_fc1.weight" and error > 0.1


def refuse(late, wrapped, words):
    layout, mhc = Layout(pp=2), interleaved("whole", "fused")
    layout.initialize()
    config = layout.config("dense", num_layers=4)
    config.delay_wgrad_compute = True
    if late:
        chunks = delayed.build(layout, config, "dense", mhc, wrapped=wrapped)
    else:
        chunks = build(layout, config, "dense", mhc)
    with pytest.raises(ValueError, match=words):
        iterate(chunks, config, count=2, schedule=engine.forward_backward)


@pytest.mark.parametrize(
    "late, wrapped, words",
    [
        (True, False, "would lose gradients of .*DistributedDataParallelConfig delay_wgrad_compute=True"),
        (False, True, "no linear of a model chunk delays .*use Transformer Engine's layers"),
    ],
)
def test_a_model_that_was_built_otherwise_is_refused(run_ranks, late, wrapped, words):
    run_ranks(2, refuse, late, wrapped, words)
