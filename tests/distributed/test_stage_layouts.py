"""--pipeline-model-parallel-layout: stages of any size, some without a layer, against one process."""

import pytest
from harness import Layout, compare, reference
from pipeline import compare_all, interleaved, reference_of

from megatron_mhc import MHCConfig

ERROR = 1e-10
MHC = MHCConfig()
FOUR, TWO_BY_TWO = Layout(pp=4), Layout(pp=2, vpp=2)
# (ranks, kind): four decoder layers each
LAYOUTS = {
    "Etttt|L": (Layout(pp=2), "dense"),
    "Ett|t|t|L": (FOUR, "dense"),
    "Ett||tt|L": (TWO_BY_TWO, "dense"),
    "Et|ttt||L": (TWO_BY_TWO, "tied"),
    "Ett|t||tL": (FOUR, "dense"),
    "Et||ttt|L": (FOUR, "moe"),
    "Ett|t||tmL": (FOUR, "mtp"),
}


def matches(result):
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


@pytest.mark.parametrize("stages", LAYOUTS)
@pytest.mark.parametrize("mhc", [None, MHC], ids=["stock", "mhc"])
def test_custom_layout_matches_single_process(run_ranks, stages, mhc):
    layout, kind = LAYOUTS[stages]
    overrides = dict(pipeline_model_parallel_layout=stages)
    matches(run_ranks(layout.pp, compare, layout, kind, mhc, reference(kind, mhc), overrides)[0])


def test_prediction_layers_may_be_stated_as_none_at_all(run_ranks):
    """By a zero; the last decoder layer's stage has the final norm."""
    overrides = dict(pipeline_model_parallel_layout="Ett|ttL", mtp_num_layers=0)
    matches(run_ranks(2, compare, Layout(pp=2), "dense", MHC, reference("dense", MHC), overrides)[0])


def test_custom_layout_with_replayed_streams(run_ranks):
    mhc, overrides = MHCConfig(recompute_layer_num="auto"), dict(pipeline_model_parallel_layout="Ett|t||tL")
    matches(run_ranks(4, compare, FOUR, "dense", mhc, reference("dense", MHC), overrides)[0])


@pytest.mark.parametrize("boundary", ["whole", "split"])
@pytest.mark.parametrize("stages, layout", [("Ett|t|t|L", FOUR), ("Etttt|L", Layout(pp=2))])
def test_the_stage_that_sends_nothing_may_have_no_layer(run_ranks, stages, layout, boundary):
    """Under the plugin's own schedule, with either boundary."""
    overrides = dict(num_layers=4, pipeline_model_parallel_layout=stages)
    cases = [(interleaved(boundary), 4, reference_of("dense", MHC, 4, 4))]
    matches(run_ranks(layout.pp, compare_all, layout, "dense", cases, overrides)[0][0])
