"""Every Megatron symbol that megatron_mhc replaces, on one screen.

A replacement is a function of the original and leaves models without mHC exactly as they are. In addition
`pretrain_gpt.py` (and `testing/cpu.py`, which patches much more, for CPUs alone) keeps Megatron
from running `make` where the wheel has no Makefile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mhc.hooks.block import predict_by_plain_layers, remember_when_built
from megatron_mhc.hooks.bridge import keep_what_is_new, refuse_dense_export, refuse_fsdp
from megatron_mhc.hooks.combined import ask_embedding_gradient, cut_between_streams
from megatron_mhc.hooks.fsdp2 import shard_mappings_first
from megatron_mhc.hooks.full_recompute import ask_input_gradient
from megatron_mhc.hooks.load import guard_fsdp_load, guard_load, guard_load_state_dict
from megatron_mhc.hooks.messages import widen_messages, widen_receive_buffer
from megatron_mhc.hooks.optimizer import (
    detach_float32_shards,
    explain_other_layout,
    lend_main_gradients,
    load_by_masters,
    master_every_parameter,
    number_all_parameters,
    number_float32_first,
    save_current_float32,
)
from megatron_mhc.hooks.prediction import (
    build_between_streams,
    contract_beside_prediction,
    run_between_streams,
)
from megatron_mhc.hooks.schedule import choose_schedule
from megatron_mhc.hooks.train_step import sample_steps
from megatron_mhc.pipeline.buffers import own_in_fused_steps

_BRIDGE = "megatron.bridge.models"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
_FSDP2 = "megatron.core.distributed.torch_fully_sharded_data_parallel"
_HYBRID = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"
_INFERENCE = "megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper"
_MTP = "megatron.core.transformer.multi_token_prediction"
_OPTIMIZER = "megatron.core.optimizer.optimizer"


@dataclass(frozen=True)
class Hook:
    """One replaced symbol.

    Args:
        target: "module:attribute", or "module:Class.attribute".
        defined_in: module whose code the original must be; another module means a foreign patch.
        parameters: the original's parameter names, in order.
        replacement: takes the original and returns what stands in its place.
        reason: why no public seam will do.
    """

    target: str
    defined_in: str
    parameters: tuple[str, ...]
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        defined_in="megatron.core.pipeline_parallel.p2p_communication",
        parameters=(
            "self",
            "tensor_send_next",
            "tensor_send_prev",
            "recv_prev",
            "recv_next",
            "tensor_shape",
            "wait_on_reqs",
        ),
        replacement=widen_messages,
        reason="1F1B and interleaved 1F1B size messages by config.hidden_size; streams are n times wider",
    ),
    Hook(
        target=f"{_INFERENCE}:AbstractModelInferenceWrapper._allocate_recv_buffer",
        defined_in=_INFERENCE,
        parameters=("self", "batch_size", "seq_len"),
        replacement=widen_receive_buffer,
        reason="inference on a pipeline also sizes messages by config.hidden_size, and does not send them by "
        "P2PCommunicator",
    ),
    Hook(
        target="megatron.core.transformer.transformer_block:_get_block_submodules",
        defined_in="megatron.core.transformer.transformer_block",
        parameters=("config", "spec", "vp_stage", "pp_rank"),
        replacement=remember_when_built,
        reason="a framework may build the model with a copy of the config that lacks the mHC options",
    ),
    Hook(
        target="megatron.core.models.gpt.gpt_layer_specs:get_gpt_mtp_block_spec_for_backend",
        defined_in="megatron.core.models.gpt.gpt_layer_specs",
        parameters=("config", "spec", "backend", "vp_stage", "pp_rank"),
        replacement=predict_by_plain_layers,
        reason="frameworks build MTP layers of the decoder's last layer, which would expand streams again",
    ),
    Hook(
        target="megatron.core.models.common.fine_grained_callables:build_transformer_layer_callables",
        defined_in="megatron.core.models.gpt.fine_grained_callables",
        parameters=("layer",),
        replacement=cut_between_streams,
        reason="--overlap-moe-expert-parallel-comm: its nodes carry one hidden state, and add the residual",
    ),
    Hook(
        target="megatron.core.models.common.utils:PreProcessNode.forward_impl",
        defined_in="megatron.core.models.common.utils",
        parameters=("self",),
        replacement=ask_embedding_gradient,
        reason="--overlap-moe-expert-parallel-comm behind a frozen embedding ends in the first step, in "
        "models without mHC too",
    ),
    Hook(
        target="megatron.core.utils:GlobalMemoryBuffer.get_tensor",
        defined_in="megatron.core.utils",
        parameters=("self", "tensor_shape", "dtype", "name", "mem_alloc_context"),
        replacement=own_in_fused_steps,
        reason="--mhc-pipeline-schedule fused: it reuses one buffer, which the node of another microbatch "
        "would overwrite",
    ),
    Hook(
        target="megatron.core.transformer.transformer_block:TransformerBlock.has_final_layernorm_in_this_stage",
        defined_in="megatron.core.transformer.transformer_block",
        parameters=("self",),
        replacement=contract_beside_prediction,
        reason="under MTP it is on the last decoder layer's stage; streams go on to the one of MTP",
    ),
    Hook(
        target=f"{_MTP}:_get_mtp_block_submodules",
        defined_in=_MTP,
        parameters=("config", "spec"),
        replacement=build_between_streams,
        reason="under --mhc-mtp multistream all layers of multi-token prediction are built so",
    ),
    Hook(
        target=f"{_MTP}:MultiTokenPredictionBlock.forward",
        defined_in=_MTP,
        parameters=(
            "self",
            "input_ids",
            "position_ids",
            "hidden_states",
            "attention_mask",
            "padding_mask",
            "context",
            "context_mask",
            "rotary_pos_emb",
            "rotary_pos_cos",
            "rotary_pos_sin",
            "attention_bias",
            "inference_params",
            "packed_seq_params",
            "sequence_len_offset",
            "extra_block_kwargs",
            "embedding",
        ),
        replacement=run_between_streams,
        reason="a depth under --mhc-mtp multistream hands on streams, and its output goes to the loss",
    ),
    Hook(
        target="megatron.core.dist_checkpointing:load",
        defined_in="megatron.core.dist_checkpointing.serialization",
        parameters=(
            "sharded_state_dict",
            "checkpoint_dir",
            "sharded_strategy",
            "validate_access_integrity",
            "strict",
            "verify_integrity",
            "process_group",
        ),
        replacement=guard_load,
        reason="an mHC model must refuse a plain checkpoint, or take it by --mhc-load-dense, before loading "
        "starts; a plain model must refuse an mHC checkpoint",
    ),
    Hook(
        target="megatron.core.transformer.module:MegatronModule.load_state_dict",
        defined_in="torch.nn.modules.module",
        parameters=("self", "state_dict", "strict", "assign"),
        replacement=guard_load_state_dict,
        reason="--ckpt-format torch: after a failed strict load megatron.training loads without `strict`, "
        "and a plain model would drop the mappings of an mHC checkpoint",
    ),
    Hook(
        target=f"{_DISTRIBUTED}:DistributedOptimizer._build_optimizer_group_ranges",
        defined_in=_DISTRIBUTED,
        parameters=("param_groups", "gbuf_ranges"),
        replacement=number_float32_first,
        reason="it numbers fp32 and bf16 parameters in another order than its groups do, and saving fails",
    ),
    Hook(
        target=f"{_DISTRIBUTED}:DistributedOptimizer._build_model_and_main_param_groups",
        defined_in=_DISTRIBUTED,
        parameters=("gbuf_ranges", "param_gbuf_map", "opt_group_ranges", "config"),
        replacement=detach_float32_shards,
        reason="it leaves fp32 shards attached to autograd, which optimizers and loading refuse",
    ),
    Hook(
        target=f"{_DISTRIBUTED}:DistributedOptimizer._get_main_param_and_optimizer_states",
        defined_in=_DISTRIBUTED,
        parameters=("self", "model_param"),
        replacement=save_current_float32,
        reason="--use-precision-aware-optimizer: of an fp32 parameter it saves the value of the first step",
    ),
    Hook(
        target=f"{_HYBRID}:HybridDeviceOptimizer._get_sub_optimizer_param_groups",
        defined_in=_HYBRID,
        parameters=("self", "offload_fraction"),
        replacement=master_every_parameter,
        reason="--optimizer-cpu-offload: fp32 parameters on the GPU do not train, and none can be resumed",
    ),
    Hook(
        target=f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params.sharded_state_dict",
        defined_in=_OPTIMIZER,
        parameters=("self", "model_sharded_state_dict", "is_loading", "metadata"),
        replacement=number_all_parameters,
        reason="it numbers only the bf16 parameters, and saving the fp32 ones fails",
    ),
    Hook(
        target=f"{_OPTIMIZER}:Float16OptimizerWithFloat16Params._copy_model_grads_to_main_grads",
        defined_in=_OPTIMIZER,
        parameters=("self",),
        replacement=lend_main_gradients,
        reason="--use-torch-fsdp2: it asks for a main_grad of fp32 parameters, which have none",
    ),
    *(
        Hook(
            target=f"{module}:{name}",
            defined_in=module,
            parameters=("self", "state_dict", *more),
            replacement=replacement,
            reason="a torch-format state is keyed by parameter index: none of megatron_mhc 0.1, or of "
            "another optimizer, fits, and Megatron's error names no remedy",
        )
        for replacement, module, name, *more in (
            (explain_other_layout, _OPTIMIZER, "ChainedOptimizer.load_state_dict"),
            (explain_other_layout, _OPTIMIZER, "FP32Optimizer.load_state_dict"),
            (explain_other_layout, _DISTRIBUTED, "DistributedOptimizer.load_state_dict"),
            (load_by_masters, _OPTIMIZER, "Float16OptimizerWithFloat16Params.load_state_dict"),
            (
                explain_other_layout,
                _DISTRIBUTED,
                "DistributedOptimizer.load_parameter_state_from_dp_zero",
                "update_legacy_format",
            ),
        )
    ),
    Hook(
        target=f"{_FSDP2}:TorchFullyShardedDataParallel.__init__",
        defined_in=_FSDP2,
        parameters=(
            "self",
            "config",
            "ddp_config",
            "module",
            "sub_modules_to_wrap",
            "disable_bucketing",
            "process_group",
        ),
        replacement=shard_mappings_first,
        reason="--use-torch-fsdp2: its units are whole layers, whose parameters have to be of one dtype",
    ),
    *(
        Hook(
            target=f"megatron.core.{module}:checkpointed_forward",
            defined_in="megatron.core.recompute",
            parameters=(
                "self",
                "hidden_states",
                "attention_mask",
                "context",
                "context_mask",
                "rotary_pos_emb",
                "attention_bias",
                "packed_seq_params",
                "use_inner_quantization_context",
                "padding_mask",
                "extract_layer_indices",
                "layer_offset",
            ),
            replacement=ask_input_gradient,
            reason="full recompute behind a frozen embedding gives no layer a gradient, without mHC too",
        )
        for module in ("transformer.transformer_block", "models.hybrid.hybrid_block")
    ),
)

# Registered beside HOOKS where --mhc-log-interval is given: megatron.training is then needed.
TRAINING_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="megatron.training.training:train_step",
        defined_in="megatron.training.training",
        parameters=(
            "forward_step_func",
            "data_iterator",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "config",
            "forward_backward_func",
            "iteration",
            "pg_collection",
            "p2p_communicator",
        ),
        replacement=sample_steps,
        reason="--mhc-log-interval: the training loop has no callback before or after a step",
    ),
)

# Registered beside HOOKS by the spec of a training run whose schedule, named or taken by
# --mhc-pipeline-schedule auto, is not megatron.
SCHEDULE_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="megatron.training.training:get_forward_backward_func",
        defined_in="megatron.core.pipeline_parallel.schedules",
        parameters=("pp_size", "vp_size", "schedule_pg_collection"),
        replacement=choose_schedule,
        reason="--mhc-pipeline-schedule interleaved and fused: pretrain() takes no schedule",
    ),
)

# Registered beside HOOKS by `bridge.use_mhc`: symbols of Megatron-Bridge.
BRIDGE_HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_BRIDGE}.conversion.mapping_registry:MegatronMappingRegistry.megatron_to_hf_lookup",
        defined_in=f"{_BRIDGE}.conversion.mapping_registry",
        parameters=("self", "megatron_param_name"),
        replacement=keep_what_is_new,
        reason="Hugging Face weights have no mappings of the streams, and the final norm lies elsewhere",
    ),
    *(
        Hook(
            target=f"{_BRIDGE}.conversion.{name}",
            defined_in=f"{_BRIDGE}.conversion.{name.partition(':')[0]}",
            parameters=("self", *parameters.split(", ")),
            replacement=refuse_dense_export,
            reason="a dense model, or its adapters, would be written where the streams have no place",
        )
        for name, parameters in (
            (
                "auto_bridge:AutoBridge.save_hf_pretrained",
                "model, path, show_progress, source_path, strict, merge_adapter_weights, distributed_save, "
                "save_every_n_ranks, weight_dtype",
            ),
            (
                "peft_bridge:MegatronPeftBridge.stream_adapter_weights_megatron_to_hf",
                "megatron_model, cpu, show_progress, exclude_adapter_base_prefixes",
            ),
        )
    ),
    Hook(
        target=f"{_BRIDGE}.model_provider:get_model",
        defined_in=f"{_BRIDGE}.model_provider",
        parameters=(
            "model_provider",
            "ddp_config",
            "model_type",
            "overlap_param_gather_with_optimizer_step",
            "fp16",
            "bf16",
            "use_megatron_fsdp",
            "use_torch_fsdp2",
            "wrap_with_ddp",
            "data_parallel_random_init",
            "use_cpu_initialization",
            "init_model_with_meta_device",
            "pre_wrap_hook",
            "mixed_precision_wrapper",
            "pg_collection",
        ),
        replacement=refuse_fsdp,
        reason="no provider knows whether it wraps by FSDP, which mHC does not support in Megatron-Bridge",
    ),
)

# Registered beside HOOKS under --use-megatron-fsdp, whose checkpoints megatron.training loads by itself.
FSDP_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="megatron.training.checkpointing:_load_base_checkpoint",
        defined_in="megatron.training.checkpointing",
        parameters=(
            "load_dir",
            "args",
            "rank0",
            "sharded_state_dict",
            "checkpointing_context",
            "dp_cp_group",
            "expt_dp_group",
            "gpt_compat_layer_maps",
        ),
        replacement=guard_fsdp_load,
        reason="fsdp_dtensor: what has no place in the model is dropped, and under "
        "--no-strict-fsdp-dtensor-load what is absent is left as initialised: checkpoints of other mHC "
        "parameters, and plain ones, would be taken",
    ),
)
