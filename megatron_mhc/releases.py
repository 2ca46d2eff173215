"""What the supported releases of Megatron-Core differ in.

The tables of `hooks/` and the code of this package say what 0.19 has. A release's row here says what is other
in it; whoever depends on that asks `release()`, and nobody else asks for a version. What is called by another
name, or has to be written where a release lacks it, is `training_doors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import NamedTuple

from packaging.specifiers import SpecifierSet

SUPPORTED = ">=0.17.0,<0.20"  # what an index has; pyproject.toml says the same
MAIN = "Megatron-LM's main branch of 2026-08-22 (d98e8a64)"
KNOWN = f"megatron-core {SUPPORTED}, or take {MAIN}"  # behind "install"
# By which Megatron's own mHC is turned on, on main and on dev; fields of TransformerConfig, and flags.
OWN_SWITCHES = ("enable_mhc_connections", "enable_hyper_connections")

_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_HYBRID = "megatron.core.models.hybrid.hybrid_block"
_MODELS = "megatron.core.models"
_MTP = "megatron.core.transformer.multi_token_prediction"
_STEPS = "megatron.core.num_microbatches_calculator:StepBatchsizeNumMicroBatchesCalculator"
_TRAINING = "megatron.training"


class Other(NamedTuple):
    """A symbol that differs from its row in `hooks/targets.py` or `hooks/uses.py`; None: as there.

    Args:
        parameters: its parameter names, in order.
        name: "module:attribute", where it has another.
        names: attributes that its code sets or reads, on which we rely.
    """

    parameters: str | None = None
    name: str | None = None
    names: tuple[str, ...] | None = None


ABSENT = Other()  # nothing of this package needs it there


class Release(NamedTuple):
    """A series of Megatron-Core.

    Args:
        versions: as a specifier of pip.
        own_mhc: it has hyper-connections of its own, see OWN_SWITCHES.
        own_options: those of its own that it registers as flags by names of ours.
        symbols: what differs from the tables of `hooks/`, by their targets.
        read_by_mlp: keywords of a layer's forward that `_forward_mlp` takes behind `inference_context`.
        after_mlp: the layer's method that adds an MLP's output to the residual.
        spec_is_called: --spec may name a function, which Megatron calls; else it is the spec itself.
        not_packed: the keyword by which `get_batch_on_this_tp_rank` is told that sequences are not packed.
        te_router_graphs: Transformer Engine's graphs that end at the router hand on what crosses their edge.
        hybrid: it has a HybridModel.
        multistream: its layers of multi-token prediction can be built between streams.
        cuda_graphs: its CUDA graphs can hold connections.
        keeps_what_it_sends: its interleaved schedule frees no output that is still being sent.
        pretrain_parses: `pretrain` reads the command line, and the batch of a TP rank the data iterator.
    """

    versions: str
    own_mhc: bool = False
    own_options: tuple[str, ...] = ()
    symbols: Mapping[str, Other] = MappingProxyType({})
    read_by_mlp: tuple[str, ...] = ("padding_mask", "packed_seq_params")
    after_mlp: str = "_forward_post_mlp"
    spec_is_called: bool = True
    not_packed: str = "has_cu_seqlens"
    te_router_graphs: bool = True
    hybrid: bool = True
    multistream: bool = True
    cuda_graphs: bool = True
    keeps_what_it_sends: bool = True
    pretrain_parses: bool = False


_OF_018 = {
    f"{_LAYER}._forward_mlp": Other("self, hidden_states, inference_context, padding_mask"),
    f"{_LAYER}._te_cuda_graph_replay_impl": ABSENT,
    **{
        f"{_MODELS}.common.{module}:{name}": Other(name=f"{_MODELS}.gpt.fine_grained_callables:{name}")
        for module, name in (
            ("fine_grained_callables", "build_transformer_layer_callables"),
            ("utils", "TransformerLayerNode.__init__"),
            ("utils", "TransformerLayerNode.detach"),
            ("utils", "TransformerLayerNode.forward_impl"),
            ("utils", "PreProcessNode.forward_impl"),
        )
    },
    f"{_DISTRIBUTED}._synthesize_state_dict_params_for_model": ABSENT,
    "megatron.core.dist_checkpointing:load": Other(
        "sharded_state_dict, checkpoint_dir, sharded_strategy, common_strategy, "
        "validate_access_integrity, strict, verify_integrity"
    ),
    f"{_HYBRID}:HybridStackSubmodules": Other(
        "mamba_layer, gdn_layer, attention_layer, dsa_layer, mlp_layer, moe_layer, mtp_block_spec"
    ),
    f"{_TRAINING}.training:train_step": Other(
        "forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config, "
        "forward_backward_func, iteration"
    ),
    f"{_TRAINING}.training:get_forward_backward_func": Other("pp_size, vp_size"),
    f"{_TRAINING}.checkpointing:_load_base_checkpoint": Other(
        "load_dir, args, rank0, sharded_state_dict, checkpointing_context"
    ),
    f"{_TRAINING}.models.gpt:default_layer_spec": ABSENT,
    f"{_TRAINING}.argument_utils:gpt_config_from_args": ABSENT,
    f"{_TRAINING}.argument_utils:hybrid_config_from_args": Other("args, config"),
    f"{_TRAINING}:pretrain": Other(
        "cfg_container, train_valid_test_dataset_provider, model_provider, model_type, "
        "forward_step_func, process_non_loss_data_func, get_embedding_ranks, "
        "get_position_embedding_ranks, non_loss_data_func, store, inprocess_call_wrapper"
    ),
    "megatron.core.utils:get_batch_on_this_tp_rank": Other(
        "batch, is_sft, is_hybrid_cp, create_attention_mask_in_dataloader, broadcast_src_rank, "
        "broadcast_group, cp_size, tp_rank, micro_batch_size, seq_length, mtp_on_this_rank, "
        "pipeline_model_parallel_size, is_pipeline_first_stage, is_pipeline_last_stage"
    ),
    "megatron.core.utils:get_batch_on_this_cp_rank": Other(
        "batch, is_hybrid_cp, cp_group, hybrid_cp_group_func"
    ),
}

_OF_017 = {
    **_OF_018,
    f"{_LAYER}.__init__": Other(
        "self, config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage, is_mtp_layer, "
        "add_layer_offset, pp_layer_offset"
    ),
    "megatron.core.transformer.mlp:MLP.as_mlp_submodule": ABSENT,
    "megatron.core.full_cuda_graph:FullCudaGraphWrapper.reset_cuda_graph": ABSENT,
    f"{_MTP}:MultiTokenPredictionLayer.__init__": ABSENT,
    f"{_MTP}:MultiTokenPredictionLayer._proj_and_transformer_layer": ABSENT,
    f"{_MTP}:MultiTokenPredictionBlock.forward": ABSENT,
    f"{_MTP}:mtp_on_this_rank": Other("config, ignore_virtual, vp_stage"),
    "megatron.core.transformer.moe.moe_layer:MoELayer.__init__": Other(
        "self, config, submodules, layer_number, pg_collection, is_mtp_layer"
    ),
    "megatron.core.transformer.transformer_block:checkpointed_forward": Other(
        name="megatron.core.transformer.transformer_block:TransformerBlock._checkpointed_forward"
    ),
    f"{_HYBRID}:checkpointed_forward": ABSENT,
    f"{_HYBRID}:HybridStack.__init__": ABSENT,
    f"{_HYBRID}:HybridStackSubmodules": ABSENT,
    f"{_MODELS}.hybrid.hybrid_model:HybridModel.__init__": ABSENT,
    f"{_MODELS}.hybrid.hybrid_layer_allocation:parse_hybrid_pattern": ABSENT,
    "megatron.core.ssm.mamba_layer:MambaLayer.__init__": ABSENT,
    f"{_STEPS}._parse_schedule": ABSENT,
    f"{_TRAINING}:pretrain": Other(
        "train_valid_test_dataset_provider, model_provider, model_type, forward_step_func, "
        "process_non_loss_data_func, extra_args_provider, args_defaults, get_embedding_ranks, "
        "get_position_embedding_ranks, non_loss_data_func, store, inprocess_call_wrapper"
    ),
    f"{_TRAINING}.argument_utils:pretrain_cfg_container_from_args": ABSENT,
    f"{_TRAINING}.argument_utils:hybrid_config_from_args": ABSENT,
    f"{_TRAINING}.models.hybrid:HybridModelConfig": ABSENT,
    f"{_TRAINING}.arguments:parse_and_validate_args": ABSENT,
    "megatron.core.utils:get_batch_on_this_tp_rank": Other(
        "data_iterator, mtp_on_this_rank", name=f"{_TRAINING}.utils:get_batch_on_this_tp_rank"
    ),
    "megatron.core.utils:get_batch_on_this_cp_rank": Other("batch, cp_group"),
}

RELEASES = (
    Release(
        ">=0.17.0,<0.18",
        symbols=_OF_017,
        read_by_mlp=("padding_mask",),
        spec_is_called=False,
        te_router_graphs=False,
        hybrid=False,
        multistream=False,
        cuda_graphs=False,
        keeps_what_it_sends=False,
        pretrain_parses=True,
    ),
    Release(
        ">=0.18.0,<0.19",
        symbols=_OF_018,
        read_by_mlp=("padding_mask",),
        spec_is_called=False,
        not_packed="is_sft",
        te_router_graphs=False,
    ),
    Release(">=0.19.0,<0.20"),
    Release(
        ">=0.20.0.dev0,<0.21",
        own_mhc=True,
        own_options=(
            "num_residual_streams",
            "sinkhorn_iterations",
            "init_gating_factor",
            "recompute_layer_num",
        ),
        symbols={
            f"{_LAYER}._forward_attention": Other(names=("_apply_self_attn_bda_step",)),
            f"{_LAYER}._forward_post_mlp": Other(
                "self, mlp_output_with_bias, residual, mlp_state", name=f"{_LAYER}._apply_mlp_bda_step"
            ),
            f"{_LAYER}Submodules": Other(
                "input_layernorm, self_attention_hyper_connection, self_attention, self_attn_bda, "
                "pre_cross_attn_layernorm, cross_attention_hyper_connection, cross_attention, "
                "cross_attn_bda, pre_mlp_layernorm, mlp_hyper_connection, mlp, mlp_bda, "
                "sharded_state_dict_keys_map"
            ),
        },
        after_mlp="_apply_mlp_bda_step",
    ),
)


def release() -> Release:
    """The row of the Megatron-Core that is imported.

    Raises:
        ValueError: there is none: this package was not written for it.
    """
    from megatron.core import __version__ as version

    own = find_spec("megatron.core.transformer.hyper_connection") is not None
    plain = version.split("+")[0]  # a git checkout appends +<commit> to the version
    rows = [row for row in RELEASES if SpecifierSet(row.versions, prereleases=True).contains(plain)]
    for row in rows:
        if row.own_mhc == own:
            return row
    if own:
        raise ValueError(
            f"megatron-core {version} has hyper-connections of its own, as Megatron-LM's dev branch: use "
            f"those, or install {KNOWN}"
        )
    raise ValueError(f"megatron-core {version} is not supported: install {KNOWN}")


def check_hybrid() -> None:
    """Raise ValueError unless the imported Megatron-Core has a HybridModel."""
    if not release().hybrid:
        from megatron.core import __version__ as version

        raise ValueError(f"megatron-core {version} has no HybridModel: install 0.18 or later, or train a GPT")
