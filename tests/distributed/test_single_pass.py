"""`--mhc-read previous` in every layout: what is handed on crosses layers, chunks, stages and replays.

In float64 against one process. Its arithmetic is held against others' in test_single_pass_native.py.
"""

import pytest
import torch
from graphed_steps import PREPROCESS, ROUTER, full, local, name, te
from graphed_steps import compare as compare_graphs
from harness import Layout, compare, reference
from layout_cases import BLOCK, CORE, CORE_CASES, FOUR_RANKS, SETTINGS, TWO_RANKS, UNIFORM
from pipeline import cases
from pipeline import check as check_schedule
from test_hybrid import check as check_hybrid
from test_inference import generate
from test_recompute_parity import check as check_recompute

from megatron_mhc import MHCConfig

V41, MEAN = dict(preset="deepseek_v41"), dict(read="previous", contract="mean")
FULL = {
    "uniform_pp2_vpp2_moe": (Layout(pp=2, vpp=2), "moe", UNIFORM),
    "uniform_tp2_distributed": (Layout(tp=2), "dense", UNIFORM | dict(distribute_saved_activations=True)),
    "block_ep2": (Layout(ep=2), "moe", BLOCK),
}
FAST_CORE = {("tp2_sp", "moe"), ("pp2", "moe"), ("pp2_vpp2", "dense"), ("cp2", "token_local"), ("ep2", "moe")}


def some(fast, every):
    return [pytest.param(*case, marks=[] if case in fast else pytest.mark.slow) for case in every]


def check(run_ranks, world, layout, kind, options, dtype=torch.float64, **overrides):
    mhc = MHCConfig(**options)
    expected = reference(kind, mhc, dtype)
    result = run_ranks(world, compare, layout, kind, mhc, expected, overrides | dict(params_dtype=dtype))[0]
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    error, worst = result.worst
    assert result.loss <= limit
    assert error <= limit, worst


@pytest.mark.parametrize("layout, kind", some(FAST_CORE, CORE_CASES))
@pytest.mark.parametrize("n", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_core_layout_matches_one_process(run_ranks, layout, kind, n):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, V41 | dict(num_residual_streams=n))


@pytest.mark.parametrize("layout", some({("pp2_mtp",)}, [(name,) for name in TWO_RANKS]))
def test_two_rank_layout_matches_one_process(run_ranks, layout):
    check(run_ranks, 2, *TWO_RANKS[layout], MEAN)


@pytest.mark.parametrize("layout", some({("tp2_pp2_vpp2_sp",)}, [(name,) for name in FOUR_RANKS]))
def test_four_rank_layout_matches_one_process(run_ranks, layout):
    check(run_ranks, 4, *FOUR_RANKS[layout], V41)


@pytest.mark.parametrize("setting", FULL)
def test_weights_pass_megatrons_checkpoint_of_a_layer(run_ranks, setting):
    layout, kind, overrides = FULL[setting]
    check(run_ranks, 2, layout, kind, V41, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_matches_one_process(run_ranks, setting):
    layout, kind, overrides = SETTINGS[setting]
    check(run_ranks, 2, layout, kind, V41, **overrides)


@pytest.mark.parametrize("layout, kind", [("pp2_vpp2", "dense")])
def test_float32_layout_matches_one_process(run_ranks, layout, kind):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, V41, dtype=torch.float32)


@pytest.mark.parametrize("vpp, kind", [(None, "moe_shared"), (3, "dense")])
def test_schedules_hand_on_over_both_boundaries(run_ranks, vpp, kind):
    several = cases((3,), read="previous") + cases((2,), streams=(2,), **V41)
    check_schedule(run_ranks, 2, Layout(pp=2, vpp=vpp), kind, several, 6, overrides=dict(num_layers=6))


@pytest.mark.parametrize("stages", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_schedules_replay(run_ranks, stages):
    layout = Layout(pp=4) if stages else Layout(pp=2, vpp=2, ep=2)
    several = cases((4,), recompute_layer_num="2", **V41)
    several += cases((4,), recompute_layer_num="auto", recompute_coefficients=True, **MEAN)
    kind = "dense" if stages else "moe_shared"
    check_schedule(run_ranks, 4, layout, kind, several, 4, overrides=dict(num_layers=4))


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2, vpp=2)], ids=["tp2_sp", "pp2_vpp2"])
@pytest.mark.parametrize("again", [False, True])
def test_recompute_keeps_every_bit(run_ranks, layout, again):
    kind = "moe" if layout.tp > 1 else "dense"
    check_recompute(run_ranks, 2, layout, kind, recompute_coefficients=again, **V41)


HYBRID = {
    "vpp2": (Layout(pp=2, vpp=2), "*|-|*|E", {}),
    "last_stage_without_layers": (Layout(pp=2), "*-*-|", {}),
    "ep2": (Layout(ep=2), "*-*E", {}),
    "full_recompute": (Layout(pp=2), "M-*|*E", UNIFORM),
}


@pytest.mark.parametrize("case", HYBRID)
def test_hybrid_layout_matches_one_process(run_ranks, case):
    layout, pattern, settings = HYBRID[case]
    check_hybrid(run_ranks, 2, layout, pattern, MHCConfig(**V41), **settings)


@pytest.mark.parametrize("graphed", [local(), te(), te("attn"), te("mlp"), full()], ids=name)
def test_graphs_of_dense_layers(run_ranks, graphed):
    compare_graphs(run_ranks, 1, Layout(), "dense", MHCConfig(**V41), graphed)


@pytest.mark.parametrize("graphed", [te("attn", *ROUTER), te(*PREPROCESS)], ids=name)
def test_graphs_of_experts(run_ranks, graphed):
    compare_graphs(run_ranks, 1, Layout(), "moe", MHCConfig(**MEAN), graphed)


@pytest.mark.slow  # Triton's interpreter
@pytest.mark.timeout(600)
@pytest.mark.parametrize("graphed", [te("attn", *ROUTER), te(*PREPROCESS)], ids=name)
def test_kernels_hand_on_across_the_edge_of_a_graph(run_ranks, graphed):
    mhc = MHCConfig(backend="triton", sinkhorn_iterations=2, **MEAN)
    compare_graphs(run_ranks, 1, Layout(), "moe", mhc, graphed, dict(num_layers=2), False, 1)


@pytest.mark.parametrize("pp, stages", [(2, "Etttt|L"), (4, "Ett|t||tL")])
def test_tokens_on_a_pipeline_have_the_logits_of_one_process(run_ranks, pp, stages):
    mhc = MHCConfig(**V41)
    expected = run_ranks(1, generate, Layout(), mhc)[0]
    *_, found = run_ranks(pp, generate, Layout(pp=pp), mhc, stages)
    assert (found - expected).abs().max() <= 1e-5
