"""Every private or undocumented symbol of Megatron, and of torch, that megatron_mhc calls or reads.

`targets.py` has those that it replaces. `check_uses` compares both with what is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer"
_HYBRID = "megatron.core.models.hybrid"
_MAMBA_LAYER = "megatron.core.ssm.mamba_layer:MambaLayer"
_MTP = "megatron.core.transformer.multi_token_prediction"
_MOE_LAYER = "megatron.core.transformer.transformer_layer:MoETransformerLayer"
_GRAPHABLE = "megatron.core.transformer.module:GraphableMegatronModule"
_WHOLE_STEP = "megatron.core.full_cuda_graph:FullCudaGraphWrapper"
_BLOCK = "megatron.core.transformer.transformer_block"
_MOE = "megatron.core.transformer.moe.moe_layer:MoELayer"
_NODE = "megatron.core.models.common.utils:TransformerLayerNode"
_SHARDED = "megatron.core.dist_checkpointing.optimizer"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_TE = "megatron.core.extensions.transformer_engine"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_TRAINING = "megatron.training"
_BRIDGE = "megatron.bridge"


@dataclass(frozen=True)
class Use:
    """One symbol that is used as it is.

    Args:
        target: "module:attribute", or "module:Class.attribute".
        parameters: its parameter names in order; None for what has no signature.
        names: attributes that its code sets or reads, on which we rely.
    """

    target: str
    parameters: str | None
    names: tuple[str, ...] = ()


USES: tuple[Use, ...] = (
    # layer.py, recompute/chunk.py
    Use(
        f"{_LAYER}.__init__",
        "self, config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage, is_mtp_layer, "
        "add_layer_offset, pp_layer_offset, name",
        (
            "input_layernorm",
            "pre_mlp_layernorm",
            "recompute_input_layernorm",
            "recompute_pre_mlp_layernorm",
            "mlp",
            "is_moe_layer",
            "layer_number",
        ),
    ),
    Use(
        f"{_LAYER}._forward_attention",
        "self, hidden_states, attention_mask, context, context_mask, rotary_pos_emb, rotary_pos_cos, "
        "rotary_pos_sin, rotary_pos_cos_sin, attention_bias, inference_context, packed_seq_params, "
        "sequence_len_offset, padding_mask, inference_params",
        ("self_attn_bda",),
    ),
    Use(f"{_LAYER}._forward_mlp", "self, hidden_states, inference_context, padding_mask, packed_seq_params"),
    Use(f"{_LAYER}._forward_post_mlp", "self, mlp_output_with_bias, residual", ("mlp_bda",)),
    Use(
        f"{_LAYER}Submodules",
        "input_layernorm, self_attention, self_attn_bda, pre_cross_attn_layernorm, cross_attention, "
        "cross_attn_bda, pre_mlp_layernorm, mlp, mlp_bda, sharded_state_dict_keys_map",
    ),
    Use("megatron.core.utils:make_viewless_tensor", "inp, requires_grad, keep_graph"),
    # norm.py; of Transformer Engine's, Megatron has a class or a stand-in
    Use("megatron.core.transformer.identity_op:IdentityOp", None),
    Use(
        "megatron.core.transformer.attention:SelfAttentionSubmodules",
        "linear_qkv, core_attention, linear_proj, q_layernorm, k_layernorm",
    ),
    Use("megatron.core.transformer.mlp:MLPSubmodules", "linear_fc1, linear_fc2, activation_func"),
    Use(
        "megatron.core.transformer.mlp:MLP.as_mlp_submodule",
        "submodules, config, pg_collection, is_mtp_layer, is_expert, input_size, ffn_hidden_size, name",
    ),
    Use(f"{_TE}:TELayerNormColumnParallelLinear", None),
    Use(f"{_TE}:TEColumnParallelLinear", None),
    Use(f"{_TE}:HAVE_TE", None),
    # checkpoint_parts.py: it calls ours
    Use(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._synthesize_state_dict_params_for_model",
        "state_dict_flat, model_chunk",
    ),
    # layer.py, graphs.py: CUDA graphs
    Use(f"{_GRAPHABLE}.get_layer_static_inputs", "self, seq_length, micro_batch_size"),
    Use(f"{_GRAPHABLE}._get_submodules_under_cudagraphs", "self"),
    Use(f"{_GRAPHABLE}._should_call_local_cudagraph", "self, args, kwargs"),
    Use(f"{_GRAPHABLE}._te_cuda_graph_capture", "self, args, kwargs"),
    Use(f"{_LAYER}._te_cuda_graph_replay_impl", "self, args, kwargs, context", ("_te_cuda_graph_replay",)),
    Use(f"{_LAYER}.create_mcore_cudagraph_manager", "self, config", ("cudagraph_manager",)),
    Use(f"{_GRAPHABLE}._te_cuda_graph_replay", "self, args, kwargs"),
    Use(f"{_GRAPHABLE}._should_call_te_cudagraph", "self, args, kwargs"),
    Use(f"{_MOE_LAYER}.transition_cudagraph_scope", "self, mode", ("cudagraph_manager_router",)),
    Use(f"{_MOE_LAYER}._forward_mlp_router", "self, hidden_states, padding_mask"),
    Use(f"{_MOE_LAYER}._forward_mlp_postprocess", "self, residual, output, shared_expert_output, mlp_bias"),
    Use("megatron.core.transformer.cuda_graphs:delete_cuda_graphs", ""),
    Use(f"{_WHOLE_STEP}.reset_cuda_graph", "self, stage", ("cuda_graph", "result", "curr_iteration")),
    # hooks/messages.py
    Use(
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator.__init__",
        "self, pp_group, config",
        ("config",),
    ),
    Use(
        "megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper:"
        "AbstractModelInferenceWrapper.__init__",
        "self, model, inference_context",
        ("model", "config"),
    ),
    # mtp.py, hooks/prediction.py
    Use(
        f"{_MTP}:MultiTokenPredictionLayer.__init__",
        "self, config, submodules, layer_number, vp_stage, pg_collection, mtp_layer_pattern, "
        "hybrid_submodules, mamba_submodules, name",
        ("enorm", "hnorm", "eh_proj", "mtp_model_layer", "final_layernorm", "sequence_parallel", "tp_group"),
    ),
    Use(f"{_MTP}:MultiTokenPredictionLayer._concat_embeddings", "self, hidden_states, decoder_input"),
    Use(f"{_MTP}:MultiTokenPredictionLayer._postprocess", "self, hidden_states"),
    Use(
        f"{_MTP}:MultiTokenPredictionLayer._proj_and_transformer_layer",
        "self, hidden_states, decoder_input, attention_mask, padding_mask, context, context_mask, "
        "rotary_pos_emb, rotary_pos_cos, rotary_pos_sin, attention_bias, inference_params, "
        "packed_seq_params, sequence_len_offset",
        ("_concat_embeddings", "_postprocess"),
    ),
    Use(f"{_MTP}:MultiTokenPredictionLayerSubmodules", "enorm, hnorm, layer_norm, eh_proj, mtp_model_layer"),
    Use("megatron.core.tensor_parallel.mappings:all_to_all_hp2sp", "input_, group"),
    Use(f"{_MTP}:mtp_on_this_rank", "layout, mtp_num_layers, ignore_virtual, vp_stage"),
    # specs.py, streams.py, carried.py, schedule/stages.py
    Use("megatron.core.transformer.spec_utils:ModuleSpec", "module, params, submodules, metainfo"),
    Use(f"{_BLOCK}:TransformerBlockSubmodules", "layer_specs, layer_norm"),
    Use(f"{_BLOCK}:TransformerBlock._build_layers", "self", ("layers", "layer_norm", "final_layernorm")),
    Use(
        f"{_BLOCK}:TransformerBlock.__init__",
        "self, config, spec, post_layer_norm, pre_process, post_process, pg_collection, vp_stage",
        ("submodules",),
    ),
    Use(
        "megatron.core.transformer.pipeline_parallel_layer_layout:PipelineParallelLayerLayout.__init__",
        "self, layout, pipeline_model_parallel_size",
        ("layout",),
    ),
    Use("megatron.core.models.gpt.gpt_model:GPTModel.__init__", None, ("decoder",)),
    Use(f"{_BLOCK}:get_num_layers_to_build", "config, vp_stage, pp_rank"),
    Use(f"{_BLOCK}:LayerNormImpl", None),
    # hyper_connection.py, parallel.py
    Use(
        "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel._make_forward_pre_hook",
        "self",
    ),
    Use(
        "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._post_forward",
        "self, module, input, output",
    ),
    Use("torch.nn:Module._apply", "self, fn, recurse"),
    Use(
        "torch.nn:Module._load_from_state_dict",
        "self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs",
    ),
    Use(
        "megatron.core.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads",
        "model, config, tp_group",
        ("sequence_parallel",),
    ),
    # checkpoint.py, hooks/optimizer.py
    Use("megatron.core.dist_checkpointing:load_tensors_metadata", "checkpoint_dir, sharded_strategy"),
    Use(f"{_SHARDED}:get_param_id_to_sharded_param_map", "model_sharded_state_dict, optim_params_iter"),
    Use(f"{_SHARDED}:make_sharded_optimizer_tensor", "model_param, optim_param, prefix"),
    Use(
        f"{_SHARDED}:optim_state_to_sharding_state", "optim_state_dict, id_to_sharded_param_map, exclude_keys"
    ),
    Use(
        f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params.__init__",
        "self, optimizer, config, grad_scaler, init_state_fn",
        ("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups"),
    ),
    Use(
        f"{_OPTIMIZER}:MegatronOptimizer.__init__",
        "self, optimizer, config, init_state_fn",
        ("optimizer", "config", "init_state_fn"),
    ),
    Use(f"{_OPTIMIZER}:MegatronOptimizer._extract_common_per_param_step", "state_dict"),
    # pipeline/layer_nodes.py, layer_parts.py
    Use(f"{_LAYER}._forward_pre_mlp_layernorm", "self, hidden_states"),
    Use(
        f"{_MOE}.__init__",
        "self, config, submodules, layer_number, pg_collection, is_mtp_layer, name",
        ("token_dispatcher",),
    ),
    Use(f"{_MOE}.route", "self, hidden_states, padding_mask"),
    Use(f"{_MOE}.shared_experts_compute", "self, hidden_states"),
    Use(f"{_MOE}.preprocess", "self, hidden_states, probs, routing_map"),
    Use(f"{_MOE}.dispatch", "self, hidden_states, probs"),
    Use(f"{_MOE}.routed_experts_compute", "self, hidden_states, probs"),
    Use(f"{_MOE}.combine", "self, output"),
    Use(f"{_MOE}.postprocess", "self, output, shared_expert_output"),
    # pipeline/combined_nodes.py
    Use(
        f"{_NODE}.__init__",
        "self, stream, event, layer_state, chunk_state, submodule, name, bwd_dw_callables, extra_args",
        ("layer_state", "chunk_state", "is_mtp", "is_last_layer"),
    ),
    Use(f"{_NODE}.detach", "self, t", ("before_detached",)),
    Use(f"{_NODE}.forward_impl", "self, args", ("submodule",)),
    Use(
        "megatron.core.models.common.model_chunk_schedule_plan:TransformerModelChunkSchedulePlan.__init__",
        None,
        ("attention_mask", "packed_seq_params", "model"),
    ),
)

# Of a HybridModel: hybrid.py, mamba.py, sublayer.py, wrapping.py, diagnostics/sampler.py.
HYBRID_USES: tuple[Use, ...] = (
    Use(
        f"{_HYBRID}.hybrid_block:HybridStack.__init__",
        "self, config, submodules, pre_process, layer_type_list, pp_layer_offset, post_layer_norm, "
        "post_process, device, dtype, pg_collection, is_mtp_layer, name",
        ("final_norm", "layers", "pre_process", "layer_type_list"),
    ),
    Use(
        f"{_HYBRID}.hybrid_block:HybridStackSubmodules",
        "mamba_layer, gdn_layer, attention_layer, dsa_layer, mla_layer, mlp_layer, moe_layer, mtp_block_spec",
    ),
    Use(f"{_HYBRID}.hybrid_model:HybridModel.__init__", None, ("hybrid_layer_pattern", "decoder")),
    Use(f"{_HYBRID}.hybrid_layer_allocation:parse_hybrid_pattern", "pattern"),
    Use("megatron.core.ssm.mlp_layer:MLPLayer", None),
    Use(f"{_MAMBA_LAYER}Submodules", "norm, mixer, mamba_bda, sharded_state_dict_keys_map"),
    Use(
        f"{_MAMBA_LAYER}.__init__",
        "self, config, submodules, layer_number, pg_collection, pp_layer_offset, name",
        ("norm", "mixer", "mamba_bda", "layer_number"),
    ),
    Use(
        f"{_MAMBA_LAYER}.forward",
        "self, hidden_states, attention_mask, inference_context, rotary_pos_emb, inference_params, "
        "packed_seq_params",
        ("mamba_bda",),
    ),
)

# Beside targets.TRAINING_HOOKS.
TRAINING_USES: tuple[Use, ...] = (
    Use(f"{_TRAINING}:get_tensorboard_writer", ""),
    Use(f"{_TRAINING}:get_wandb_writer", ""),
)

# Beside targets.FSDP_HOOKS: parallel.py.
FSDP_USES: tuple[Use, ...] = (
    Use(
        "megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp:MegatronFSDP._register_fsdp_hooks",
        "self, root_module",
        ("register_forward_hook", "register_forward_pre_hook"),
    ),
)

# Beside targets.SCHEDULE_HOOKS: pipeline/.
SCHEDULE_USES: tuple[Use, ...] = (
    Use(
        f"{_SCHEDULES}:forward_step",
        "forward_step_func, data_iterator, model, num_microbatches, input_tensor, forward_data_store, "
        "config, cp_group_size, collect_non_loss_data, checkpoint_activations_microbatch, "
        "is_first_microbatch, current_microbatch, vp_stage, is_last_stage",
    ),
    Use(f"{_SCHEDULES}:check_first_val_step", "first_val_step, forward_only, cond"),
    Use(f"{_SCHEDULES}:clear_embedding_activation_buffer", "config, model, is_last_stage"),
    Use(f"{_SCHEDULES}:finish_embedding_wgrad_compute", "config, embedding_module, is_last_stage, tp_group"),
    Use(f"{_SCHEDULES}:forward_backward_no_pipelining", None),
    Use("megatron.core.utils:get_model_config", "model"),
    Use("megatron.core.utils:get_attr_wrapped_model", "model, attr, allow_none, return_model_obj"),
    Use("megatron.core.process_groups_config:ProcessGroupCollection.use_mpu_process_groups", "required_pgs"),
    Use("torch.distributed:ProcessGroup._get_backend", None),
)

# Of the spec door.
SPEC_USES: tuple[Use, ...] = (
    Use(f"{_TRAINING}:get_args", ""),
    Use(f"{_TRAINING}.models.gpt:default_layer_spec", "config, vp_stage"),
    Use(f"{_TRAINING}.argument_utils:gpt_config_from_args", "args, config, model_config_cls"),
    Use(
        "megatron.core.num_microbatches_calculator:StepBatchsizeNumMicroBatchesCalculator._parse_schedule",
        "schedule_str, seq_length",
    ),
)

# Of pretrain_gpt.py.
PRETRAIN_USES: tuple[Use, ...] = (
    Use(
        f"{_TRAINING}:pretrain",
        "cfg_container, train_valid_test_dataset_provider, model_type, forward_step_func, model_provider, "
        "process_non_loss_data_func, get_embedding_ranks, get_position_embedding_ranks, non_loss_data_func, "
        "store, inprocess_call_wrapper, p2p_communicator, pg_collection, skip_model_parallel_init",
    ),
    Use(f"{_TRAINING}.argument_utils:pretrain_cfg_container_from_args", "args, model_cfg"),
    Use(f"{_TRAINING}.argument_utils:hybrid_config_from_args", "args, config, model_config_cls"),
    Use(f"{_TRAINING}.models.hybrid:HybridModelConfig", None),
    Use(f"{_TRAINING}.arguments:core_transformer_config_from_args", "args, config_class"),
    Use(
        f"{_TRAINING}.arguments:parse_and_validate_args",
        "extra_args_provider, ignore_unknown_args, args_defaults",
    ),
    Use(f"{_TRAINING}.utils:get_blend_and_blend_per_split", "args"),
    Use(f"{_TRAINING}.utils:is_first_or_last_pipeline_stage", "vp_stage"),
    Use("megatron.core.transformer.multi_token_prediction:get_mtp_ranks", "pp_ranks, config"),
    Use(
        "megatron.core.transformer.multi_token_prediction:mtp_on_this_rank",
        "layout, mtp_num_layers, ignore_virtual, vp_stage",
    ),
    Use(
        "megatron.core.utils:get_batch_on_this_tp_rank",
        "batch, has_cu_seqlens, is_hybrid_cp, create_attention_mask_in_dataloader, broadcast_src_rank, "
        "broadcast_group, cp_size, tp_rank, micro_batch_size, seq_length, mtp_on_this_rank, "
        "pipeline_model_parallel_size, is_pipeline_first_stage, is_pipeline_last_stage",
    ),
    Use(
        "megatron.core.utils:get_batch_on_this_cp_rank",
        "batch, is_hybrid_cp, cp_group, hybrid_cp_group_func, use_per_sequence_balancing",
    ),
    Use("megatron.core.datasets.utils:compile_helpers", ""),
)

# Of Megatron-Bridge, beside targets.BRIDGE_HOOKS.
BRIDGE_USES: tuple[Use, ...] = (
    # bridge/provider.py
    Use(
        f"{_BRIDGE}.models.gpt_provider:GPTModelProvider.provide",
        "self, pre_process, post_process, vp_stage",
        ("transformer_layer_spec", "attention_backend", "mtp_block_spec"),
    ),
    Use(f"{_BRIDGE}.models.gpt_provider:mtp_block_spec", "config, vp_stage", ("get_gpt_mtp_block_spec",)),
    Use(
        f"{_BRIDGE}.models.hybrid.hybrid_provider:HybridModelProvider._resolve_hybrid_stack_spec",
        "self",
        ("hybrid_stack_spec",),
    ),
    Use(f"{_BRIDGE}.models.hybrid.hybrid_provider:get_default_hybrid_stack_spec", "config"),
    Use(f"{_BRIDGE}.utils.instantiate_utils:register_allowed_target_prefix", "prefix"),
    # hooks/bridge.py
    Use(
        f"{_BRIDGE}.models.conversion.param_mapping:MegatronParamMapping.__init__",
        "self, megatron_param, hf_param",
    ),
    Use(
        f"{_BRIDGE}.models.conversion.param_mapping:MegatronParamMapping.hf_to_megatron",
        "self, hf_weights, megatron_module",
    ),
    Use(
        f"{_BRIDGE}.models.conversion.param_mapping:MegatronParamMapping.megatron_to_hf",
        "self, megatron_weights, megatron_module",
    ),
    Use(
        f"{_BRIDGE}.models.conversion.model_bridge:MegatronModelBridge.build_conversion_tasks",
        "self, hf_pretrained, megatron_model, weight_dtype",
        ("megatron_to_hf_lookup", "config"),
    ),
    Use(
        f"{_BRIDGE}.models.conversion.model_bridge:MegatronModelBridge.load_weights_hf_to_megatron",
        "self, hf_pretrained, megatron_model, allowed_mismatched_params",
        ("hf_to_megatron",),
    ),
)

# Of Megatron-Bridge's training loop: bridge/diagnostics.py.
BRIDGE_TRAINING_USES: tuple[Use, ...] = (
    Use(
        f"{_BRIDGE}.training.train:train",
        None,
        ("on_train_start", "on_train_step_start", "on_train_step_end", "train_state", "step"),
    ),
    Use(
        f"{_BRIDGE}.training.callbacks:CallbackContext",
        "state, model, user_state, optimizer, scheduler, loss_dict, grad_norm, skipped_iter, total_loss_dict",
    ),
    Use(f"{_BRIDGE}.training.callbacks:CallbackManager.add", "self, callback"),
    Use(f"{_BRIDGE}.training.state:GlobalState.tensorboard_logger", None),
    Use(f"{_BRIDGE}.training.state:GlobalState.wandb_logger", None),
)
