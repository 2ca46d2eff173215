"""What works together with mHC, as data: scripts/doc_tables.py writes it into docs/support.md.

A row's tests are what shows it: the page says "yes" or "refused" where they passed in a run whose outcomes
docs/results/support keeps (support_runs.py). tests/unit/test_doc_pages.py asks that each test exists and that
the page is current.
"""

from __future__ import annotations

from typing import NamedTuple

YES, REFUSED, UNTESTED = "yes", "refused", "untested"


class Feature(NamedTuple):
    """One row.

    Args:
        name: of Megatron's feature or flag, in Markdown; the README has the name only, so it is short.
        state: YES where a test runs it, REFUSED where building the model raises, else UNTESTED.
        note: how far it goes, or why not.
        tests: "file under tests/::function"; none for UNTESTED.
        on: the kind of run that shows it, see `support_runs`; any where empty.
        group: one of GROUPS.
    """

    name: str
    state: str
    note: str
    tests: tuple[str, ...] = ()
    on: str = ""
    group: str = ""


# In the order of the page and of the README.
GROUPS = (
    "parallelism",
    "schedules",
    "memory",
    "models",
    "precision",
    "kernels and graphs",
    "data",
    "optimizers and sharding",
    "checkpoints and diagnostics",
    "inference and export",
    "frameworks",
    "releases",
)

_AWARE = "distributed/test_precision_aware.py::test_"
_BRIDGE = "bridge/test_bridge.py::test_"
_CONTRACTION = "distributed/test_contraction.py::test_"
_GATED = "distributed/test_gated.py::test_"
_TRAINING = "gpu/test_training.py::test_"
_HYBRID = "distributed/test_hybrid.py::test_"
_PAIRS = "distributed/test_convert_pairs.py::test_"
_OVERLAP = "distributed/test_expert_overlap.py::test_"
_PARITY = "distributed/test_parity.py::test_"
_MTP = "distributed/test_mtp.py::test_"
_SCHEDULE = "distributed/test_pipeline_schedule.py::test_"
_REFUSALS = "unit/test_refusals.py::test_"

FEATURES = (
    Feature(
        "random combinations of the switches of all groups",
        YES,
        "on two and four ranks; each trains as one process does, or is refused as it is built: [what each "
        "of 300 did](docs/results/support/switches.tsv), of which 12 run without `-m slow`",
        ("distributed/test_switches.py::test_combination_trains_as_its_twin_or_is_refused_by_name",),
        group="parallelism",
    ),
    Feature(
        "TP, sequence parallelism",
        YES,
        "n = 1, 2, 4",
        (_PARITY + "core_layout_matches_single_process",),
        group="parallelism",
    ),
    Feature(
        "PP, VPP, custom layouts, empty stages",
        YES,
        "2 and 4 stages; VPP with overlapped p2p",
        (
            _PARITY + "core_layout_matches_single_process",
            "distributed/test_stage_layouts.py::test_custom_layout_matches_single_process",
        ),
        group="parallelism",
    ),
    Feature(
        "EP, ETP",
        YES,
        "alltoall and allgather dispatchers, shared experts",
        (
            _PARITY + "two_rank_layout_matches_single_process",
            _PARITY + "four_rank_layout_matches_single_process",
        ),
        group="parallelism",
    ),
    Feature(
        "CP",
        YES,
        "with token-local attention; Transformer Engine's CP attention is untested",
        (_PARITY + "core_layout_matches_single_process",),
        group="parallelism",
    ),
    Feature(
        "DP, distributed optimizer, mixtures of these",
        YES,
        "",
        (_PARITY + "four_rank_layout_matches_single_process",),
        group="parallelism",
    ),
    Feature(
        "two GPUs over NCCL",
        YES,
        "`MEGATRON_MHC_GPU_TESTS=nccl`",
        (_PARITY + "core_layout_matches_single_process", _SCHEDULE + "two_stages"),
        on="nccl",
        group="parallelism",
    ),
    Feature(
        "GQA, MLA, biases, dropout, LayerNorm, RMSNorm, tied embeddings, MTP of plain layers",
        YES,
        "not MLA with TP, where Megatron's own local MLA is inexact",
        (_PARITY + "two_rank_layout_matches_single_process", _PARITY + "variant_matches_single_process"),
        group="models",
    ),
    Feature(
        "MTP between streams (`--mhc-mtp multistream`)",
        YES,
        "[as DeepSeek-V4 has it](docs/mtp.md); every layout and schedule; n = 2, 4; with every recompute, "
        "repeated and detached layers; compared with Megatron-LM's branch dev where there is a checkout",
        (
            _MTP + "layout_matches_single_process",
            _MTP + "context_parallel_matches_single_process",
            _MTP + "schedule_matches_single_process",
            _MTP + "setting_matches_plain_single_process",
            _MTP + "replayed_streams_keep_every_bit",
            _MTP + "resharded_training_matches_unbroken_run",
            _MTP + "bf16_training_resumes_bit_for_bit",
        ),
        group="models",
    ),
    Feature(
        "MTP on a stage without a decoder layer (`Et|tt|m|L`)",
        YES,
        "with the loss on the same stage, or, under Megatron's schedule, on the next one",
        (
            _MTP + "stage_of_prediction_matches_single_process",
            "distributed/test_inference.py::test_layers_of_mtp_stand_aside_on_a_pipeline",
        ),
        group="models",
    ),
    Feature(
        "Megatron's recompute, selective and full",
        YES,
        "",
        (
            _PARITY + "setting_matches_plain_single_process",
            _HYBRID + "full_recompute_behind_a_frozen_embedding_trains_a_hybrid_model",
        ),
        group="memory",
    ),
    Feature(
        "`--mhc-recompute-layer-num`",
        YES,
        "bit for bit, in every layout of parallelism; not with full recompute",
        (
            "distributed/test_recompute_parity.py::test_core_layout_keeps_every_bit",
            "distributed/test_recompute_parity.py::test_setting_keeps_every_bit",
        ),
        group="memory",
    ),
    Feature(
        "`--mhc-pipeline-schedule`, `--mhc-pp-boundary split`",
        YES,
        "[limits](docs/schedules.md#refused)",
        (_SCHEDULE + "two_stages", _SCHEDULE + "four_stages", _SCHEDULE + "experts_on_two_ranks"),
        group="schedules",
    ),
    Feature(
        "`--mhc-pipeline-schedule auto`",
        YES,
        "[how it chooses](docs/schedules.md#auto)",
        (
            "unit/test_pipeline_auto.py::test_auto_takes_what_was_measured_to_be_fastest",
            "distributed/test_auto_schedule.py::test_auto_trains_as_the_schedule_that_it_takes",
        ),
        group="schedules",
    ),
    Feature(
        "`--mhc-norm folded`",
        YES,
        "float64; GQA, MLA, MoE, Megatron's layers and stand-ins for Transformer Engine's",
        (
            "distributed/test_folded_norm.py::test_folded_matches_apart",
            "unit/test_optional_parts.py::test_folded_norms_change_neither_numbers_nor_parameters_nor_entries",
        ),
        group="kernels and graphs",
    ),
    Feature(
        "`--mhc-read previous` (single-pass mHC)",
        YES,
        "every layout, schedule, recompute, CUDA graph and inference; [limits](docs/single_pass.md)",
        (
            "distributed/test_single_pass.py::test_core_layout_matches_one_process",
            "distributed/test_single_pass.py::test_schedules_hand_on_over_both_boundaries",
            "distributed/test_single_pass.py::test_recompute_keeps_every_bit",
            "distributed/test_single_pass.py::test_graphs_of_experts",
            "ops/test_previous.py::test_outputs_and_every_gradient_match_float64",
        ),
        group="models",
    ),
    Feature(
        "`--overlap-moe-expert-parallel-comm`",
        YES,
        "under Megatron's schedule, with and without a pipeline, and under `fused`; not timed on GPUs; "
        "[limits](docs/schedules.md#refused)",
        (
            _OVERLAP + "trains_as_one_process_does",
            _OVERLAP + "replayed_streams",
            _OVERLAP + "a_model_without_mhc_keeps_every_bit",
            "megatron/test_expert_overlap_pretrain.py::"
            "test_training_gives_the_losses_that_it_gives_without_the_flag",
        ),
        group="schedules",
    ),
    Feature(
        "`--delay-wgrad-compute`",
        YES,
        "under `fused` on a pipeline, and with `--overlap-moe-expert-parallel-comm`; elsewhere refused",
        ("distributed/test_pipeline_delayed.py::test_setting", _OVERLAP + "delayed_weight_gradients"),
        group="schedules",
    ),
    Feature(
        "microbatches of different lengths",
        YES,
        "`variable_seq_lengths` of the TransformerConfig, for which Megatron has no flag; under Megatron's "
        "schedule: `interleaved` and `fused` refuse it",
        (
            "distributed/test_variable_lengths.py::test_micro_batches_of_different_lengths_match_a_single_process",
        ),
        group="data",
    ),
    Feature(
        "packed sequences (THD)",
        YES,
        "TP, PP, VPP, EP, CP, every schedule; with stand-ins for attention, which only Transformer Engine's "
        "packs; `megatron_mhc.pretrain_gpt` has no `--sft`",
        (
            "distributed/test_packed.py::test_packed_sequences_match_the_sequences_one_by_one",
            "distributed/test_packed.py::test_packed_sequences_over_context_ranks_match_a_single_process",
        ),
        group="data",
    ),
    Feature(
        "`--sft`",
        YES,
        "packed conversations, by Megatron-LM's own script; TP2, PP2 and `interleaved` on a CPU",
        ("megatron/test_sft.py::test_conversations_are_learned_as_on_one_process",),
        on="releases",
        group="data",
    ),
    Feature(
        "`--reset-attention-mask`, `--reset-position-ids`",
        YES,
        "",
        ("distributed/test_packed.py::test_reset_attention_masks_match_the_sequences_one_by_one",),
        group="data",
    ),
    Feature(
        "frozen stages and embeddings",
        YES,
        "",
        ("distributed/test_pipeline_frozen.py::test_what_is_trained_gets_its_gradients",),
        group="models",
    ),
    Feature(
        "adapters (LoRA)",
        YES,
        "in the manner of Megatron-Bridge: mappings, adapters or both are trained",
        (
            "distributed/test_adapters.py::test_what_is_trained_gets_the_gradients_of_one_process",
            "distributed/test_adapters.py::test_bf16_training_resumed_matches_unbroken_run_bit_for_bit",
        ),
        group="models",
    ),
    Feature(
        "Transformer Engine, bf16, grouped GEMM, gradient-accumulation fusion",
        YES,
        "one GPU",
        (
            "gpu/test_te.py::test_fused_gradient_accumulation_matches_unfused",
            "gpu/test_te.py::test_recompute_matches_no_recompute_bit_for_bit",
        ),
        on="gpu",
        group="precision",
    ),
    Feature(
        "`--fp32-residual-connection`",
        YES,
        "fp32 streams, F in bf16; the Hopper kernels take bf16 streams only. In Megatron too the norm has "
        "to return bf16, or autocast be on",
        ("distributed/test_fp32_residual.py::test_layout_matches_single_process",),
        group="precision",
    ),
    Feature(
        "`--heterogeneous-layers-config-path`, layers without attention or without an MLP",
        YES,
        "streams pass what is not there unchanged; not with `--mhc-recompute-layer-num`, `fused`, `split`, "
        "diagnostics or CUDA graphs of single layers",
        (
            "distributed/test_heterogeneous.py::test_layout_matches_single_process",
            "distributed/test_heterogeneous.py::test_resharded_training_matches_unbroken_run",
        ),
        group="models",
    ),
    Feature(
        "HybridModel",
        YES,
        "attention, MLA, MLP, MoE and Mamba layers; TP, EP, PP, VPP, MTP of plain layers; one connection a "
        "layer, [limits](docs/hybrid.md); Mamba shown with a stand-in for its mixer",
        (
            _HYBRID + "hybrid_layout_matches_single_process",
            _HYBRID + "pairs_of_attention_and_mlp_are_the_gpt_whose_checkpoint_they_load",
            _HYBRID + "resharded_hybrid_training_matches_unbroken_run",
        ),
        group="models",
    ),
    Feature(
        "gated delta nets in a HybridModel (`G`)",
        YES,
        "TP with sequence parallel, EP, CP, PP, resharding: Megatron's module with plain torch for its "
        "kernels; refused with TP without it, [why](docs/hybrid.md)",
        (
            _HYBRID + "the_stand_in_for_gated_delta_nets_is_megatrons_own_rule_in_torch",
            _HYBRID + "hybrid_layout_matches_single_process",
            _HYBRID + "gated_delta_nets_with_tp_are_refused_without_sequence_parallel",
        ),
        group="models",
    ),
    Feature(
        "`--fine-grained-activation-offloading`",
        YES,
        "under Megatron's schedule; not with `--mhc-recompute-layer-num` or full recompute",
        ("distributed/test_offloading.py::test_offloaded_activations_give_the_gradients_of_stored_ones",),
        group="memory",
    ),
    Feature(
        "`--cpu-offloading-num-layers`",
        YES,
        "Transformer Engine before 2.10 offloads what its own layers mark, hence no streams; not with "
        "`--mhc-recompute-layer-num`",
        (
            "distributed/test_cpu_offloading.py::test_trains_as_without",
            "distributed/test_cpu_offloading.py::test_offloaded_streams_leave_the_device",
            "megatron/test_cpu_offloading_pretrain.py::"
            "test_training_gives_the_losses_that_it_gives_without_the_flag",
        ),
        group="memory",
    ),
    Feature(
        "`torch.autocast`, `enable_autocast`",
        YES,
        "coefficients and streams stay fp32; MoE needs Transformer Engine, without mHC too",
        ("megatron/test_autocast.py::test_backends_agree",),
        group="precision",
    ),
    Feature(
        "`torch.compile` of a layer",
        YES,
        "mHC's kernels are in the graph",
        ("megatron/test_layer.py::test_what_mhc_adds_to_a_layer_compiles_to_one_graph",),
        group="kernels and graphs",
    ),
    Feature(
        "CUDA graphs",
        YES,
        "`local`, `transformer_engine`, `full_iteration`; bit for bit, in bf16 and in FP8 (tensorwise, "
        "delayed); [limits](docs/cuda_graphs.md#refused)",
        (
            "gpu/test_te_graphs.py::test_graphed_equals_eager_where_it_does_without_mhc",
            "distributed/test_cuda_graphs.py::test_whole_layers",
            _REFUSALS + "graphs_are_refused_under_the_overlapping_schedules_of_a_pipeline",
        ),
        group="kernels and graphs",
    ),
    Feature(
        "`--mhc-preset qwen4_exp`, the gated residual",
        YES,
        "TP, SP, PP, VPP, EP, every schedule, recompute; n = 2, 4; without kernels, "
        "[limits](docs/gated_residual.md)",
        (
            _GATED + "gated_layout_matches_single_process",
            _GATED + "gated_setting_matches_plain_single_process",
            _GATED + "recompute_keeps_every_bit",
            _GATED + "bf16_training_resumes_bit_for_bit",
            _GATED + "training_is_resharded",
            _GATED + "hybrid_layout_matches_single_process",
            "megatron/test_gated_transformers.py::test_hidden_states_and_gradients_match_transformers",
        ),
        group="models",
    ),
    Feature(
        "`--mhc-contract library`, a contraction of your own",
        YES,
        "with or without the final norm; TP, SP, PP, VPP, HybridModel, resharded checkpoints; "
        "[interface](docs/contraction.md)",
        (
            _CONTRACTION + "supplied_contraction_matches_single_process",
            _CONTRACTION + "training_with_a_supplied_contraction_is_resharded",
            _CONTRACTION + "a_hybrid_model_takes_a_contraction_too",
            _CONTRACTION + "wrong_contraction_is_refused_as_the_model_is_built",
        ),
        group="models",
    ),
    Feature(
        "`--mhc-backend triton`, `reference`",
        YES,
        "every gradient against float64",
        ("ops/test_triton.py::test_outputs_and_every_gradient_match_float64",),
        group="kernels and graphs",
    ),
    Feature(
        "`--mhc-backend hopper`",
        YES,
        "every gradient against float64",
        ("ops/test_hopper.py::test_outputs_and_every_gradient_match_float64",),
        on="gpu",
        group="kernels and graphs",
    ),
    Feature(
        "resharded checkpoints, fully parallel save, `torch` format",
        YES,
        "optimizer included",
        (
            "distributed/test_checkpoint.py::test_resharded_training_matches_unbroken_run",
            "distributed/test_checkpoint.py::test_what_ranks_save_in_parts_resumes_bit_for_bit",
        ),
        group="checkpoints and diagnostics",
    ),
    Feature(
        "conversion of checkpoints",
        YES,
        "of plain models, Megatron's dev and main branches, [published mappings](docs/checkpoints.md)",
        ("megatron/test_convert_checkpoint.py::test_checkpoint_survives_the_way_there_and_back",),
        group="checkpoints and diagnostics",
    ),
    Feature(
        "a GPT's checkpoint as the HybridModel of its layers, and back",
        YES,
        "plain or with mHC, MoE and MLA too; TP, EP and PP; without the optimizer, [limits](docs/hybrid.md)",
        (
            _PAIRS + "a_gpt_is_its_hybrid_twin_and_comes_back_bit_for_bit",
            _PAIRS + "a_plain_model_of_either_kind_starts_mhc_in_either",
            "megatron/test_convert_pairs_pretrain.py::test_a_gpt_goes_on_as_a_hybrid_model_and_back",
        ),
        group="checkpoints and diagnostics",
    ),
    Feature(
        "`--use-megatron-fsdp`",
        YES,
        "`optim`, `optim_grads`, `optim_grads_params`; over gloo, and on one GPU; with TP, SP, EP, MTP, "
        "recompute and `--fsdp-double-buffer`; [checkpoints](checkpoints.md#fully-sharded-models); not with "
        "a pipeline, nor is Megatron's own",
        (
            "distributed/test_fsdp.py::test_sharded_parameters_train_as_one_process_does",
            "distributed/test_fsdp.py::test_megatron_fsdp_trains_as_one_process_does",
            "megatron/test_fsdp_pretrain.py::test_megatron_fsdp_resumes_bit_for_bit",
            "unit/test_options.py::test_fully_sharded_pipeline_is_refused",
        ),
        group="optimizers and sharding",
    ),
    Feature(
        "`--use-torch-fsdp2`",
        YES,
        "over gloo, and on one GPU; mapping parameters are an fp32 unit; with TP, SP, MoE, MTP and "
        "recompute; [checkpoints](checkpoints.md#fully-sharded-models); not with a pipeline, EP or tied "
        "embeddings, nor is Megatron's own",
        (
            "distributed/test_fsdp.py::test_setting_trains_as_one_process_does",
            "distributed/test_fsdp.py::test_mapping_parameters_stay_float32_in_a_bf16_model",
            "distributed/test_fsdp.py::test_fsdp2_resumes_from_its_shards_bit_for_bit",
        ),
        group="optimizers and sharding",
    ),
    Feature(
        "`--optimizer-cpu-offload`",
        YES,
        "",
        ("distributed/test_checkpoint.py::test_offloaded_optimizer_resumes_bit_for_bit",),
        group="optimizers and sharding",
    ),
    Feature(
        "`--use-precision-aware-optimizer`",
        YES,
        "with a stand-in for Transformer Engine's Adam; its checkpoint goes on without the flag too",
        (
            _AWARE + "masters_in_the_optimizer_step_as_megatrons_own_bit_for_bit",
            _AWARE + "training_resumed_matches_unbroken_run_bit_for_bit",
            _AWARE + "its_checkpoint_goes_on_without_the_flag",
        ),
        group="optimizers and sharding",
    ),
    Feature(
        "Muon",
        YES,
        "also with `--use-distributed-optimizer` (layer-wise); it takes the mappings' projections, Adam "
        "their biases and gating factors, as in DeepSeek-V4",
        (
            "distributed/test_muon.py::test_projections_go_to_muon_and_the_rest_of_a_mapping_to_adam",
            "distributed/test_muon.py::test_layout_matches_single_process",
            "distributed/test_muon.py::test_training_resumed_matches_unbroken_run_bit_for_bit",
        ),
        group="optimizers and sharding",
    ),
    Feature(
        "`--async-save`",
        YES,
        "",
        ("megatron/test_pretrain.py::test_run_resumed_under_a_switch_equals_the_unbroken_one_bit_for_bit",),
        group="checkpoints and diagnostics",
    ),
    Feature(
        "`--use-cpu-initialization`",
        YES,
        "",
        (_PARITY + "core_layout_matches_single_process",),
        group="optimizers and sharding",
    ),
    Feature(
        "diagnostics",
        YES,
        "in every layout",
        (
            "distributed/test_diagnostics_parity.py::test_four_rank_layout_reports_what_the_single_process_does",
        ),
        group="checkpoints and diagnostics",
    ),
    Feature(
        "generation with a KV cache",
        YES,
        "static context, also on a pipeline",
        ("distributed/test_inference.py::test_tokens_on_a_pipeline_have_the_logits_of_one_process",),
        group="inference and export",
    ),
    Feature(
        "Megatron's inference engines, static and dynamic",
        YES,
        "batches, TP, PP, EP; on a CPU, the dynamic one with flash-attn's functions in torch: "
        "[limits](docs/inference.md#engines)",
        (
            "distributed/test_inference_engines.py::test_engine_says_what_the_training_forward_finds_likeliest",
        ),
        group="inference and export",
    ),
    Feature(
        "CUDA graphs of inference",
        YES,
        "of the dynamic engine's decode steps, each layer or all; on a CPU, by stand-ins: "
        "[limits](docs/inference.md#cuda-graphs)",
        ("distributed/test_inference_graphs.py::test_an_engine_with_graphs_says_what_it_does_without",),
        group="inference and export",
    ),
    Feature(
        "Megatron-LM's dynamic text generation server",
        YES,
        "by the launcher; TP2 and PP2 on a CPU: [how](docs/inference.md#server)",
        ("megatron/test_text_server.py::test_a_server_gives_the_text_of_generate",),
        on="releases",
        group="inference and export",
    ),
    Feature(
        "export to a Hugging Face folder",
        YES,
        "GQA, MLA, experts, every form of mHC; [limits](docs/export.md); the logits of Megatron's local "
        "layers within 1e-4, fp32",
        (
            "megatron/test_export.py::test_exported_model_has_logits_and_loss_of_the_trained_one",
            "megatron/test_export.py::test_what_the_exported_model_has_no_form_for_is_refused_by_name",
            "megatron/test_export_layouts.py::"
            "test_exported_model_has_the_logits_and_greedy_text_of_the_layout_that_saved_it",
        ),
        group="inference and export",
    ),
    Feature(
        "import of a Hugging Face folder",
        YES,
        "exported models; Llama, Mistral, Qwen2, Qwen3, DeepSeek-V3; [limits](docs/export.md#import); bit "
        "for bit; dense models keep their logits within 1e-4, fp32",
        (
            "megatron/test_import.py::test_an_exported_model_comes_back_bit_for_bit",
            "megatron/test_import.py::"
            "test_an_imported_dense_model_with_mhc_has_the_logits_of_transformers_own_class",
            "megatron/test_import_mutations.py::"
            "test_a_mutated_file_gives_an_error_that_names_it_or_the_right_result",
        ),
        group="inference and export",
    ),
    Feature(
        "Megatron-Bridge 0.6",
        YES,
        "[GPT (experts, MLA) and hybrid providers, Hugging Face weights, training, LoRA](docs/bridge.md); "
        "TP 2, PP 2 and VPP on a CPU; skipped where it is not installed",
        (
            _BRIDGE + "hugging_face_weights_give_their_logits",
            _BRIDGE + "two_ranks_train_as_one_process",
            _BRIDGE + "resumed_training_is_the_unbroken_one",
            _BRIDGE + "bf16_training_keeps_mappings_in_fp32_and_resumes",
            _BRIDGE + "checkpoint_is_exported_to_a_folder_of_the_same_logits",
            _BRIDGE + "layers_of_mtp_stay_plain",
            _BRIDGE + "copies_of_a_provider_build_the_same_model",
            _BRIDGE + "models_with_experts_are_imported_and_exported",
            _BRIDGE + "training_starts_from_a_pretrained_checkpoint",
            _BRIDGE + "hybrid_provider_builds_the_plain_models_function_with_mhc",
            _BRIDGE + "adapters_of_bridge_train_alone_and_are_not_exported",
        ),
        on="bridge",
        group="frameworks",
    ),
    Feature(
        "frameworks that call the target of `--spec` as `(args, config, vp_stage)`",
        YES,
        "",
        ("unit/test_doors.py::test_gpt_scripts_call_the_target_with_two_arguments_or_three",),
        group="frameworks",
    ),
    Feature(
        "diagnostics as a callback of Megatron-Bridge",
        YES,
        "",
        (
            _BRIDGE + "diagnostics_are_written_at_their_steps",
            _BRIDGE + "alarm_stops_training_where_a_gain_is_out_of_range",
        ),
        on="bridge",
        group="frameworks",
    ),
    Feature(
        "apex and Transformer Engine, each there or not",
        YES,
        "",
        ("unit/test_optional_parts.py::test_losses_and_norms_match_those_without_fused_parts",),
        group="precision",
    ),
    Feature(
        "Megatron-Core 0.18, and Megatron-LM's main of 2026-08-22",
        YES,
        "[what each has](existing_script.md#releases); tested where `MHC_MEGATRON` names them",
        (
            "megatron/test_other_releases.py::test_layouts_match_a_single_process",
            "megatron/test_other_releases.py::test_the_installed_release_continues_its_checkpoint",
            "megatron/test_other_releases.py::test_its_own_script_trains_by_spec_and_by_the_launcher",
        ),
        on="releases",
        group="releases",
    ),
    Feature(
        "Megatron-Core 0.17, GPTs only",
        YES,
        "[what it has](existing_script.md#releases); tested where `MHC_MEGATRON` names it",
        ("megatron/test_other_releases.py::test_what_it_lacks_is_refused_by_name",),
        on="releases",
        group="releases",
    ),
    Feature(
        "FP8 (tensorwise, delayed, blockwise)",
        YES,
        "in F's linears only; with `--fp8-param-gather`, and with MoE; "
        "[losses on one H200](docs/experiments/2026-12-01_h200.md)",
        (_TRAINING + "fp8_trains_beside_vanilla",),
        on="gpu",
        group="precision",
    ),
    Feature("MXFP8, NVFP4", UNTESTED, "accepted where the machine has them", group="precision"),
    Feature("inference engines on a GPU", UNTESTED, "", group="inference and export"),
    Feature("Blackwell", UNTESTED, "", group="kernels and graphs"),
    Feature(
        "FP8 and FP4 recipes that the machine lacks",
        REFUSED,
        "its GPUs, its Transformer Engine or its CUDA; shown with stand-ins for the machines",
        (
            "unit/test_precision.py::test_a_recipe_is_refused_where_the_machine_lacks_it",
            "unit/test_precision.py::test_a_recipe_is_accepted_where_the_machine_has_it",
        ),
        group="precision",
    ),
    Feature(
        "full recompute in three combinations",
        REFUSED,
        "of several layers at once with MTP, shared out over TP with two MTP layers, and with activation "
        "offloading: Megatron stops in the first step",
        (_REFUSALS + "full_recompute_that_stops_in_stocks_first_step_is_refused",),
        group="memory",
    ),
    Feature(
        "Megatron-Bridge: dense Hugging Face export, other providers, FSDP",
        REFUSED,
        "neither a dense model nor adapters can be written of an mHC model; `python -m megatron_mhc.export` "
        "makes a folder of its checkpoints",
        (
            _BRIDGE + "ways_to_a_dense_model_are_refused_with_the_way_to_export",
            _BRIDGE + "what_cannot_be_served_is_refused_by_name",
        ),
        on="bridge",
        group="frameworks",
    ),
    Feature(
        "MTP between streams in a HybridModel, from plain weights, in speculative decoding",
        REFUSED,
        "[why](docs/mtp.md)",
        (
            _REFUSALS + "depths_between_streams_are_refused_in_a_hybrid_model",
            _REFUSALS + "depths_between_streams_do_not_start_from_a_plain_model",
            _MTP + "what_would_predict_from_contracted_states_is_refused",
        ),
        group="models",
    ),
    Feature(
        "cross-attention",
        REFUSED,
        "",
        (_REFUSALS + "layer_with_cross_attention_is_refused",),
        group="models",
    ),
    Feature(
        "no decoder layer on stage 0",
        REFUSED,
        "streams begin there",
        (_REFUSALS + "first_stage_without_a_layer_is_refused",),
        group="parallelism",
    ),
    Feature(
        "PP2 with VPP without overlapped p2p",
        REFUSED,
        "under Megatron's schedule, which swaps messages there",
        (_REFUSALS + "two_stages_with_virtual_ones_need_overlapped_p2p",),
        group="schedules",
    ),
    Feature(
        "Megatron's own mHC, of its branch `dev`, by these kernels",
        YES,
        "[limits](native.md); in CI under a stand-in for its module",
        (
            "megatron/test_native.py::test_accelerated_connections_equal_megatrons",
            "megatron/test_native.py::test_recomputed_connections_have_the_bits_of_kept_ones",
        ),
        group="releases",
    ),
    Feature(
        "Megatron-Core 0.16 and older; Megatron-LM's dev branch",
        REFUSED,
        "",
        ("unit/test_releases.py::test_another_megatron_is_refused_by_what_it_is",),
        group="releases",
    ),
    Feature(
        "main's own mHC (`--enable-mhc-connections`) beside this one",
        REFUSED,
        "",
        ("unit/test_releases.py::test_megatrons_own_mhc_is_refused_beside_ours",),
        group="releases",
    ),
)
