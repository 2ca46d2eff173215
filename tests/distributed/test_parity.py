"""Loss and every gradient in every parallel layout, compared with a single process.

In float64, where the layouts agree to rounding; `testing.gpt.keep_float64` says what that takes.
"""

import pytest
import torch
from harness import Layout, build, compare, global_parameters, gradient, iterate, reference
from layout_cases import CORE, CORE_CASES, FOUR_RANKS, SETTINGS, TWO_RANKS, UNIFORM, selective

from megatron_mhc import MHCConfig

MHC = MHCConfig()
FLOAT64_ERROR, FLOAT32_ERROR = 1e-10, 1e-5


def check(run_ranks, world, layout, kind, mhc=MHC, dtype=torch.float64, **overrides):
    expected = reference(kind, mhc, dtype)
    overrides |= dict(params_dtype=dtype)
    result = run_ranks(world, compare, layout, kind, mhc, expected, overrides)[0]
    limit = FLOAT64_ERROR if dtype == torch.float64 else FLOAT32_ERROR
    error, name = result.worst
    print(f"loss error {result.loss:.1e}, worst gradient error {error:.1e} ({name})")
    assert result.loss <= limit
    assert error <= limit, name


def streams_of(layout, kind):
    """The numbers of streams by default: 4, and on two ranks 1 or 2 as well."""
    return (4,) if CORE[layout][0] == 4 else (4, 2 if "moe" in kind else 1)


@pytest.mark.parametrize(
    "layout, kind, streams",
    [
        pytest.param(*case, n, marks=[] if n in streams_of(*case) else pytest.mark.slow)
        for case in CORE_CASES
        for n in (1, 2, 4)
    ],
)
def test_core_layout_matches_single_process(run_ranks, layout, kind, streams):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, MHCConfig(num_residual_streams=streams))


@pytest.mark.parametrize("layout, kind", [case for case in CORE_CASES if CORE[case[0]][0] == 2])
def test_stock_layout_matches_single_process(run_ranks, layout, kind):
    """The harness itself, on Megatron's own model: no tolerance hides behind mHC's."""
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, mhc=None)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_rank_layout_matches_single_process(run_ranks, layout):
    check(run_ranks, 2, *TWO_RANKS[layout])


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_rank_layout_matches_single_process(run_ranks, layout):
    check(run_ranks, 4, *FOUR_RANKS[layout])


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_matches_plain_single_process(run_ranks, setting):
    layout, kind, overrides = SETTINGS[setting]
    check(run_ranks, 2, layout, kind, **overrides)


VARIANTS = {
    "unconstrained": MHCConfig(h_res="unconstrained"),
    "identity": MHCConfig(h_res="identity", h_pre="fixed", contract="sum"),
    "learned_head": MHCConfig(contract="learned_head"),
    "deepseek_v4": MHCConfig(preset="deepseek_v4"),
    "deepseek_v41": MHCConfig(preset="deepseek_v41"),
    "previous": MHCConfig(read="previous", contract="mean"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2, vpp=2)], ids=["tp2_sp", "pp2_vpp2"])
def test_variant_matches_single_process(run_ranks, layout, variant):
    check(run_ranks, 2, layout, "dense", VARIANTS[variant])


@pytest.mark.parametrize("layout, kind", [("tp2_sp", "dense"), ("pp2_vpp2", "dense"), ("ep2", "moe")])
def test_float32_layout_matches_single_process(run_ranks, layout, kind):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, dtype=torch.float32)


NORM = "decoder.layers.0.input_layernorm.weight"


def dropout_gradients(layout, *settings):
    """The gradients of this rank under each of the settings, from the same state of the generators."""
    results = []
    for overrides in settings:
        layout.initialize()
        config = layout.config("biased", hidden_dropout=0.1, attention_dropout=0.1, **overrides)
        chunks = build(layout, config, "biased", MHC)
        iterate(chunks, config)
        results.append({name: gradient(p).clone() for name, p in global_parameters(chunks)})
    return results


# Not "mlp": with a bias, Megatron's own replay of an MLP recurses without end.
RECOMPUTE = {"full": UNIFORM, "selective": selective("core_attn", "layernorm")}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputed_dropout_matches_stored_activations(run_ranks, recompute):
    """Bitwise: a replay draws the masks that the forward pass drew, in and out of the TP region."""
    undropped = reference("biased", MHC).gradients
    for stored, replayed in run_ranks(2, dropout_gradients, Layout(tp=2, sp=True), {}, RECOMPUTE[recompute]):
        assert all(torch.equal(stored[name], replayed[name]) for name in stored)
        assert not torch.allclose(stored[NORM], undropped[NORM], rtol=1e-3)


def is_mapping(name):
    return "hyper_connection" in name


def unmark(parameter, name):
    if is_mapping(name):
        parameter.sequence_parallel = False


def test_unreduced_mapping_gradients_are_noticed(run_ranks):
    """Parity is a real check: without their sum over TP, the mapping gradients are wrong, and no others."""
    layout, kind = Layout(tp=2, sp=True), "dense"
    expected = reference(kind, MHC)
    result = run_ranks(2, compare, layout, kind, MHC, expected, None, unmark)[0]
    wrong = {name for name, error in result.gradients.items() if error > 1e-3}
    # Equal streams, as in the first connection, stay equal whatever H_res is: it has no gradient there.
    mappings = {name: e for name, e in expected.gradients.items() if is_mapping(name)}
    assert wrong == {name for name, e in mappings.items() if e.abs().max() > 1e-9}
