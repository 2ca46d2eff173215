"""Memory that Megatron keeps once per process, under schedules that run two micro-batches at a time."""

import itertools

import pytest
from harness import Layout
from pipeline import ERROR, cases, check, compare_partly_trained, interleaved
from thinned import each_value

ALLGATHER = dict(num_layers=4, moe_token_dispatcher_type="allgather")
LAYOUTS = {
    "ep2": Layout(pp=2, ep=2),
    "ep2_vpp2": Layout(pp=2, vpp=2, ep=2),
    "tp2_sp": Layout(pp=2, tp=2, sp=True),
    "tp2_sp_vpp2": Layout(pp=2, vpp=2, tp=2, sp=True),
    "tp2_etp1_ep2": Layout(pp=2, tp=2, ep=2, etp=1, sp=True),
    "tp2_etp2": Layout(pp=2, tp=2, etp=2, sp=True),
}
FAST = {("ep2", "moe_shared"), ("tp2_sp_vpp2", "moe_after_dense")}


@pytest.mark.parametrize(
    "layout, kind",
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in itertools.product(LAYOUTS, ["moe_shared", "moe_after_dense"])
    ],
)
def test_what_allgather_dispatches_stays_its_micro_batchs(run_ranks, layout, kind):
    check(run_ranks, 4, LAYOUTS[layout], kind, cases((4,), schedules=("fused",)), 4, overrides=ALLGATHER)


@pytest.mark.parametrize("layout, boundary", each_value(["ep2", "tp2_sp"], ["whole", "split"]))
def test_and_where_it_carries_no_gradient(run_ranks, layout, boundary):
    """Autograd notices nothing there: the experts of stage 0 and the last two layers alone are trained."""
    trained = [r"layers\.[01]\..*experts", r"layers\.[23]\.", "output_layer"]
    settings = ALLGATHER | dict(moe_layer_freq=[1, 1, 0, 0])
    mhc = interleaved(boundary, "fused")
    result = compare_partly_trained(run_ranks, 4, LAYOUTS[layout], "moe", mhc, trained, count=8, **settings)
    assert result.loss <= ERROR
    error, name = result.worst
    assert error <= ERROR, name
