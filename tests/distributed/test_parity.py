"""Loss and every gradient in every parallel layout, compared with a single process.

In float64, where the layouts agree to rounding; `testing.gpt.keep_float64` says what that takes.
"""

import pytest
import torch
from harness import Layout, build, compare, global_parameters, gradient, iterate, reference

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


# (ranks, layout, dense kind, MoE kind)
CORE = {
    "tp2": (2, Layout(tp=2), "dense", None),  # with MoE, Megatron asks for sequence parallelism
    "tp2_sp": (2, Layout(tp=2, sp=True), "dense", "moe"),
    "pp2": (2, Layout(pp=2), "dense", "moe"),
    "pp2_vpp2": (2, Layout(pp=2, vpp=2), "dense", "moe"),
    "pp4": (4, Layout(pp=4), "dense", "moe"),
    "ep2": (2, Layout(ep=2), None, "moe"),
    "cp2": (2, Layout(cp=2), "token_local", "token_local_moe"),
    "tp2_pp2": (4, Layout(tp=2, pp=2), "dense", None),
    "tp2_pp2_sp": (4, Layout(tp=2, pp=2, sp=True), "dense", "moe"),
    "dp2_distributed_optimizer": (2, Layout(distributed_optimizer=True), "dense", "moe"),
}
CORE_CASES = [(name, kind) for name, (_, _, *kinds) in CORE.items() for kind in kinds if kind]


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("layout, kind", CORE_CASES)
def test_core_layout_matches_single_process(run_ranks, layout, kind, streams):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, MHCConfig(num_residual_streams=streams))


@pytest.mark.parametrize("layout, kind", [case for case in CORE_CASES if CORE[case[0]][0] == 2])
def test_stock_layout_matches_single_process(run_ranks, layout, kind):
    """The harness itself, on Megatron's own model: no tolerance hides behind mHC's."""
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, mhc=None)


TWO_RANKS = {
    "tp2_tied": (Layout(tp=2), "tied"),
    "tp2_biased": (Layout(tp=2), "biased"),
    "tp2_sp_biased": (Layout(tp=2, sp=True), "biased"),
    "tp2_sp_moe_shared": (Layout(tp=2, sp=True), "moe_shared"),
    "tp2_sp_etp1_ep2_moe": (Layout(tp=2, sp=True, ep=2, etp=1), "moe"),
    "tp2_sp_moe_auxiliary_loss": (Layout(tp=2, sp=True), "moe_auxiliary_loss"),
    "tp2_sp_mtp": (Layout(tp=2, sp=True), "mtp"),
    "pp2_tied": (Layout(pp=2), "tied"),
    "pp2_biased": (Layout(pp=2), "biased"),
    "pp2_vpp2_moe_auxiliary_loss": (Layout(pp=2, vpp=2), "moe_auxiliary_loss"),
    "pp2_moe_after_dense": (Layout(pp=2), "moe_after_dense"),
    "pp2_mla": (Layout(pp=2), "mla"),
    "pp2_mtp": (Layout(pp=2), "mtp"),
    "pp2_vpp2_tied": (Layout(pp=2, vpp=2), "tied"),
    "pp2_vpp2_moe_shared": (Layout(pp=2, vpp=2), "moe_shared"),
    "pp2_vpp2_mla": (Layout(pp=2, vpp=2), "mla"),
    "pp2_vpp2_mtp_moe": (Layout(pp=2, vpp=2), "mtp_moe"),
    "dp2_mtp": (Layout(), "mtp"),
    "ep2_moe_shared": (Layout(ep=2), "moe_shared"),
    "ep2_moe_after_dense": (Layout(ep=2), "moe_after_dense"),
    "ep2_mtp_moe": (Layout(ep=2), "mtp_moe"),
    "ep2_distributed_optimizer": (Layout(ep=2, distributed_optimizer=True), "moe"),
}


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_rank_layout_matches_single_process(run_ranks, layout):
    check(run_ranks, 2, *TWO_RANKS[layout])


FOUR_RANKS = {
    "pp4_mtp": (Layout(pp=4), "mtp"),
    "tp2_pp2_vpp2_sp": (Layout(tp=2, pp=2, vpp=2, sp=True), "dense"),
    "tp2_pp2_sp_tied": (Layout(tp=2, pp=2, sp=True), "tied"),
    "tp2_pp2_sp_moe": (Layout(tp=2, pp=2, sp=True), "moe_shared"),
    "tp2_sp_ep2_etp1": (Layout(tp=2, sp=True, ep=2, etp=1), "moe_shared"),
    "tp2_sp_ep2_etp2": (Layout(tp=2, sp=True, ep=2, etp=2), "moe_shared"),
    "tp2_sp_cp2": (Layout(tp=2, sp=True, cp=2), "token_local"),
    "tp2_sp_dp2_distributed_optimizer": (Layout(tp=2, sp=True, distributed_optimizer=True), "dense"),
    "pp2_ep2": (Layout(pp=2, ep=2), "moe"),
    "pp2_vpp2_ep2": (Layout(pp=2, vpp=2, ep=2), "moe_after_dense"),
    "pp2_cp2": (Layout(pp=2, cp=2), "token_local"),
    "pp2_dp2_distributed_optimizer": (Layout(pp=2, distributed_optimizer=True), "dense"),
}


@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_rank_layout_matches_single_process(run_ranks, layout):
    check(run_ranks, 4, *FOUR_RANKS[layout])


FULL = dict(recompute_granularity="full", recompute_num_layers=1)
UNIFORM, BLOCK = FULL | dict(recompute_method="uniform"), FULL | dict(recompute_method="block")


def selective(*modules):
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


ALLTOALL = dict(moe_token_dispatcher_type="alltoall")  # Megatron asks for it even without MoE
STAGES = [["embedding", "decoder"], ["decoder"], ["decoder", "decoder"], ["loss"]]
SETTINGS = {
    "uniform_recompute_tp2": (Layout(tp=2), "dense", UNIFORM),
    "uniform_recompute_tp2_sp": (Layout(tp=2, sp=True), "dense", UNIFORM),
    "uniform_recompute_pp2_moe": (Layout(pp=2), "moe_shared", UNIFORM),
    "uniform_recompute_pp2_mtp": (Layout(pp=2), "mtp", UNIFORM),
    "distributed_activations_tp2": (Layout(tp=2), "dense", UNIFORM | dict(distribute_saved_activations=True)),
    "block_recompute_pp2_vpp2": (Layout(pp=2, vpp=2), "dense", BLOCK),
    "block_recompute_ep2": (Layout(ep=2), "moe", BLOCK),
    "core_attention_recompute_tp2_sp": (Layout(tp=2, sp=True), "dense", selective("core_attn")),
    "mlp_recompute_tp2_sp": (Layout(tp=2, sp=True), "dense", selective("mlp")),
    "layernorm_recompute_pp2": (Layout(pp=2), "dense", selective("layernorm")),
    "layernorm_recompute_tp2_sp_biased": (Layout(tp=2, sp=True), "biased", selective("layernorm")),
    "all_selective_recompute_pp2_vpp2": (
        Layout(pp=2, vpp=2),
        "dense",
        selective("core_attn", "mlp", "layernorm"),
    ),
    "moe_recompute_ep2": (Layout(ep=2), "moe_shared", selective("moe")),
    "moe_layernorm_recompute_ep2": (Layout(ep=2), "moe_after_dense", selective("moe", "layernorm")),
    "mla_recompute_pp2": (Layout(pp=2), "mla", selective("mla_up_proj", "core_attn")),
    "allgather_dispatcher_ep2": (Layout(ep=2), "moe", dict(moe_token_dispatcher_type="allgather")),
    "shared_expert_overlap_ep2": (Layout(ep=2), "moe_shared", dict(moe_shared_expert_overlap=True)),
    "variable_lengths_pp2": (Layout(pp=2), "dense", dict(variable_seq_lengths=True) | ALLTOALL),
    "variable_lengths_pp2_vpp2": (
        Layout(pp=2, vpp=2),
        "dense",
        dict(variable_seq_lengths=True) | ALLTOALL,
    ),
    "unbatched_messages_pp2": (Layout(pp=2), "dense", dict(batch_p2p_comm=False)),
    "uneven_stages_pp2": (Layout(pp=2), "dense", dict(num_layers_in_first_pipeline_stage=1)),
    "loss_alone_pp2_vpp2": (
        Layout(pp=2, vpp=2),
        "three_layers",
        dict(account_for_loss_in_pipeline_split=True),
    ),
    "stage_layout_pp2_vpp2": (Layout(pp=2, vpp=2), "dense", dict(pipeline_model_parallel_layout=STAGES)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_matches_plain_single_process(run_ranks, setting):
    layout, kind, overrides = SETTINGS[setting]
    check(run_ranks, 2, layout, kind, **overrides)


VARIANTS = {
    "unconstrained": MHCConfig(h_res="unconstrained"),
    "identity": MHCConfig(h_res="identity", h_pre="fixed", contract="sum"),
    "learned_head": MHCConfig(contract="learned_head"),
    "deepseek_v4": MHCConfig(preset="deepseek_v4"),
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
