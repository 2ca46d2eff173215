"""Parallel layouts, with the models that run in them and the settings of Megatron that must not show."""

from harness import Layout

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
