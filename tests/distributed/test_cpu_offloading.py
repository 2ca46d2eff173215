"""--cpu-offloading-num-layers: what layers with mHC save comes back from the host as it was.

Without Transformer Engine, by a stand-in of its context (`testing.offloading`).
"""

import gc

import pytest
import torch
from harness import Layout, build, differences, iterate, reference, tokens
from ops_chains import AHEAD
from pipeline import ERROR, gradients

from megatron_mhc import MHCConfig
from megatron_mhc.ops import kernels
from megatron_mhc.testing import offloading

OFFLOADED = dict(cpu_offloading=True, cpu_offloading_num_layers=2)


def start(layout, kind, mhc, **settings):
    offloading.install()
    layout.initialize()
    config = layout.config(kind, **settings)
    return config, build(layout, config, kind, mhc)


def compare(layout, kind, mhc, expected):
    config, chunks = start(layout, kind, mhc, **OFFLOADED)
    result = differences(iterate(chunks, config), chunks, expected, config.params_dtype)
    return result, [shape for shape, _ in offloading.copied]


OPTIONS = {
    "mhc": {},
    "two_streams_of_deepseek_v4": dict(num_residual_streams=2, preset="deepseek_v4"),
    "one_stream": dict(num_residual_streams=1, h_pre="fixed"),
}
LAYOUTS = {
    "dense": (1, Layout(), "dense"),
    "biased": (1, Layout(), "biased"),
    "mtp": (1, Layout(), "mtp"),
    "tp2_sp": (2, Layout(tp=2, sp=True), "dense"),
    "ep2": (2, Layout(ep=2), "moe_after_dense"),
}


def check(run_ranks, where, mhc):
    world, layout, kind = LAYOUTS[where]
    results = run_ranks(world, compare, layout, kind, mhc, reference(kind, mhc))
    for result, _ in results:
        error, name = result.worst
        assert result.loss <= ERROR
        assert error <= ERROR, name
    return results[0][1]


def test_megatrons_own_model_trains_as_without(run_ranks):
    assert check(run_ranks, "dense", None)


@pytest.mark.parametrize("where", LAYOUTS)
def test_trains_as_without(run_ranks, where):
    shapes = check(run_ranks, where, MHCConfig())
    count = 16 * 2 // LAYOUTS[where][1].tp
    assert any(shape.numel() == count * 4 * 32 for shape in shapes)  # the streams among them


@pytest.mark.parametrize("options", OPTIONS)
def test_options_train_as_without(run_ranks, options):
    check(run_ranks, "dense", MHCConfig(**OPTIONS[options]))


def both_ways(mhc):
    """Loss and gradients, with nothing offloaded and with two of three layers."""
    kernels.BY_NAME["triton"] = AHEAD
    found = []
    for settings in ({}, OFFLOADED):
        config, chunks = start(Layout(), "dense", mhc, num_layers=3, params_dtype=torch.float32, **settings)
        found.append((iterate(chunks, config, count=2), gradients(chunks)))
    return found


@pytest.mark.parametrize(
    "boundary", ["fused", *(pytest.param(b, marks=pytest.mark.slow) for b in ("linked", "apart"))]
)
def test_kernels_give_the_bits_that_they_give_without(run_ranks, boundary):
    """Also where one node of the graph writes a layer's streams and reads them for the next layer."""
    mhc = MHCConfig(backend="triton", sinkhorn_iterations=1, boundary=boundary)
    (loss, want), (again, got) = run_ranks(1, both_ways, mhc)[0]
    assert loss == again
    assert [name for name, gradient in want.items() if not torch.equal(got[name], gradient)] == []


def left_behind(mhc):
    """Of the tensors as large as streams that a forward pass has offloaded: how many, and how many stayed."""
    settings = OFFLOADED | dict(num_layers=3, params_dtype=torch.float32)
    _, (chunk,) = start(Layout(), "dense", mhc, **settings)
    batch = tokens(1)[0]
    places = torch.arange(batch.shape[1] - 1).expand(len(batch), -1)
    mask = torch.ones(*places.shape[1:], places.shape[1], dtype=torch.bool).triu(1)[None, None]
    loss = chunk.module(batch[:, :-1], places, mask, labels=batch[:, 1:].contiguous())
    gc.collect()  # Triton's interpreter leaves its arguments in cycles
    size = places.numel() * mhc.num_residual_streams * 32
    streams = [storage for shape, storage in offloading.copied if shape.numel() == size]
    alive = sum(storage() is not None for storage in streams)
    loss.sum().backward()
    return len(streams), alive


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_offloaded_streams_leave_the_device(run_ranks, backend):
    mhc = MHCConfig(backend=backend, sinkhorn_iterations=1)
    count, alive = run_ranks(1, left_behind, mhc)[0]
    assert count >= 4 and alive == 0


def asked_under_another_layer(mhc, expected):
    """As if a gradient of the streams left a layer before what lies behind it has gone backward."""
    offloading._Layers.begin_backward = lambda self, layer: setattr(self, "current", max(layer - 1, 0))
    return compare(Layout(), "dense", mhc, expected)[0].worst


def test_a_layer_that_gets_another_ones_tensors_is_noticed(run_ranks):
    mhc = MHCConfig()
    error, _ = run_ranks(1, asked_under_another_layer, mhc, reference("dense", mhc))[0]
    assert error > 0.01
