"""What works together with mHC, as data: scripts/doc_tables.py writes it into docs/support.md.

A row's tests are what shows it. tests/unit/test_doc_pages.py asks that each of them exists and that the page
is current.
"""

from __future__ import annotations

from typing import NamedTuple

YES, REFUSED, UNTESTED = "yes", "refused", "untested"


class Feature(NamedTuple):
    """One row.

    Args:
        name: of Megatron's feature or flag, in Markdown.
        state: YES where a test runs it, REFUSED where building the model raises, else UNTESTED.
        note: how far it goes, or why not.
        tests: "file under tests/::function"; none for UNTESTED.
    """

    name: str
    state: str
    note: str
    tests: tuple[str, ...] = ()


_HYBRID = "distributed/test_hybrid.py::test_"
_PARITY = "distributed/test_parity.py::test_"
_SCHEDULE = "distributed/test_pipeline_schedule.py::test_"
_REFUSALS = "unit/test_refusals.py::test_"

FEATURES = (
    Feature(
        "random combinations of the switches below, on two ranks",
        YES,
        "each trains as one process does, or is refused as it is built; 12 of 300 without `-m slow`",
        ("distributed/test_switches.py::test_combination_trains_as_its_twin_or_is_refused_by_name",),
    ),
    Feature(
        "TP, TP + sequence parallel",
        YES,
        "n = 1, 2, 4",
        (_PARITY + "core_layout_matches_single_process",),
    ),
    Feature(
        "PP, VPP with overlapped p2p, custom layouts, empty stages",
        YES,
        "2 and 4 stages",
        (
            _PARITY + "core_layout_matches_single_process",
            "distributed/test_stage_layouts.py::test_custom_layout_matches_single_process",
        ),
    ),
    Feature(
        "EP (alltoall, allgather, shared experts), ETP",
        YES,
        "",
        (
            _PARITY + "two_rank_layout_matches_single_process",
            _PARITY + "four_rank_layout_matches_single_process",
        ),
    ),
    Feature(
        "CP",
        YES,
        "with token-local attention; Transformer Engine's CP attention is untested",
        (_PARITY + "core_layout_matches_single_process",),
    ),
    Feature(
        "DP, distributed optimizer, mixtures of the above",
        YES,
        "",
        (_PARITY + "four_rank_layout_matches_single_process",),
    ),
    Feature(
        "two GPUs over NCCL",
        YES,
        "`MEGATRON_MHC_GPU_TESTS=nccl`",
        (_PARITY + "core_layout_matches_single_process", _SCHEDULE + "two_stages"),
    ),
    Feature(
        "GQA, MLA, biases, dropout, LayerNorm, RMSNorm, tied embeddings, MTP of plain layers",
        YES,
        "not MLA with TP, where stock's local MLA is inexact",
        (_PARITY + "two_rank_layout_matches_single_process", _PARITY + "variant_matches_single_process"),
    ),
    Feature(
        "Megatron's recompute, selective and full",
        YES,
        "",
        (
            _PARITY + "setting_matches_plain_single_process",
            "gpu/test_te.py::test_recompute_matches_no_recompute_bit_for_bit",
        ),
    ),
    Feature(
        "`--mhc-recompute-layer-num`",
        YES,
        "bit for bit, in every layout above; not with full recompute",
        (
            "distributed/test_recompute_parity.py::test_core_layout_keeps_every_bit",
            "distributed/test_recompute_parity.py::test_setting_keeps_every_bit",
        ),
    ),
    Feature(
        "`--mhc-pipeline-schedule`, `--mhc-pp-boundary split`",
        YES,
        "[limits](docs/schedules.md#refused)",
        (_SCHEDULE + "two_stages", _SCHEDULE + "four_stages", _SCHEDULE + "experts_on_two_ranks"),
    ),
    Feature(
        "`--mhc-pipeline-schedule auto`",
        YES,
        "[how it chooses](docs/schedules.md#auto)",
        (
            "unit/test_pipeline_auto.py::test_auto_takes_what_was_measured_to_be_fastest",
            "distributed/test_auto_schedule.py::test_auto_trains_as_the_schedule_that_it_takes",
        ),
    ),
    Feature(
        "`--mhc-norm folded`",
        YES,
        "float64; GQA, MLA, MoE, Megatron's layers and stand-ins for Transformer Engine's",
        (
            "distributed/test_folded_norm.py::test_folded_matches_apart",
            "unit/test_optional_parts.py::test_folded_norms_change_neither_numbers_nor_parameters_nor_entries",
        ),
    ),
    Feature(
        "`--delay-wgrad-compute`",
        YES,
        "under `fused` on a pipeline; elsewhere refused",
        ("distributed/test_pipeline_delayed.py::test_setting",),
    ),
    Feature(
        "`--variable-seq-lengths`",
        YES,
        "under Megatron's schedule; `interleaved` and `fused` refuse it",
        (
            "distributed/test_variable_lengths.py::test_micro_batches_of_different_lengths_match_a_single_process",
        ),
    ),
    Feature(
        "packed sequences (THD): TP, PP, VPP, EP, CP, every schedule",
        YES,
        "with stand-ins for attention, which only Transformer Engine's packs; "
        "`megatron_mhc.pretrain_gpt` has no `--sft`",
        (
            "distributed/test_packed.py::test_packed_sequences_match_the_sequences_one_by_one",
            "distributed/test_packed.py::test_packed_sequences_over_context_ranks_match_a_single_process",
        ),
    ),
    Feature(
        "`--reset-attention-mask`, `--reset-position-ids`",
        YES,
        "",
        ("distributed/test_packed.py::test_reset_attention_masks_match_the_sequences_one_by_one",),
    ),
    Feature(
        "frozen stages and embeddings",
        YES,
        "",
        ("distributed/test_pipeline_frozen.py::test_what_is_trained_gets_its_gradients",),
    ),
    Feature(
        "adapters (LoRA in the manner of Megatron-Bridge): mappings, adapters or both are trained",
        YES,
        "",
        (
            "distributed/test_adapters.py::test_what_is_trained_gets_the_gradients_of_one_process",
            "distributed/test_adapters.py::test_bf16_training_resumed_matches_unbroken_run_bit_for_bit",
        ),
    ),
    Feature(
        "Transformer Engine, bf16, grouped GEMM, gradient-accumulation fusion",
        YES,
        "one GPU",
        ("gpu/test_te.py::test_fused_gradient_accumulation_matches_unfused",),
    ),
    Feature(
        "`--fp32-residual-connection`",
        YES,
        "fp32 streams, F in bf16; the Hopper kernels take bf16 streams alone. In stock too the norm has to "
        "return bf16, or autocast be on",
        ("distributed/test_fp32_residual.py::test_layout_matches_single_process",),
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
    ),
    Feature(
        "HybridModel of attention, MLA, MLP, MoE and Mamba layers; TP, EP, PP, VPP, MTP of plain layers",
        YES,
        "one connection a layer, [limits](docs/hybrid.md); Mamba shown with a stand-in for its mixer",
        (
            _HYBRID + "hybrid_layout_matches_single_process",
            _HYBRID + "pairs_of_attention_and_mlp_are_the_gpt_whose_checkpoint_they_load",
            _HYBRID + "resharded_hybrid_training_matches_unbroken_run",
        ),
    ),
    Feature(
        "`--fine-grained-activation-offloading`",
        YES,
        "under Megatron's schedule, shown on a CPU; not with `--mhc-recompute-layer-num`",
        ("distributed/test_offloading.py::test_offloaded_activations_give_the_gradients_of_stored_ones",),
    ),
    Feature(
        "`torch.autocast`, `enable_autocast`",
        YES,
        "coefficients and streams stay fp32; MoE needs Transformer Engine, in stock too",
        ("megatron/test_autocast.py::test_backends_agree",),
    ),
    Feature(
        "`torch.compile` of a layer",
        YES,
        "mHC's kernels are in the graph",
        ("megatron/test_layer.py::test_what_mhc_adds_to_a_layer_compiles_to_one_graph",),
    ),
    Feature(
        "CUDA graphs: `local`, `transformer_engine`, `full_iteration`",
        YES,
        "bit for bit; [limits](docs/cuda_graphs.md#refused)",
        (
            "gpu/test_te_graphs.py::test_graphed_equals_eager_where_it_does_without_mhc",
            "distributed/test_cuda_graphs.py::test_whole_layers",
            _REFUSALS + "graphs_are_refused_under_the_overlapping_schedules_of_a_pipeline",
        ),
    ),
    Feature(
        "`--mhc-backend hopper`, `triton`, `reference`",
        YES,
        "every gradient against float64",
        (
            "ops/test_hopper.py::test_outputs_and_every_gradient_match_float64",
            "ops/test_triton.py::test_outputs_and_every_gradient_match_float64",
        ),
    ),
    Feature(
        "checkpoints resharded, optimizer included; fully parallel save; `torch` format",
        YES,
        "",
        (
            "distributed/test_checkpoint.py::test_resharded_training_matches_unbroken_run",
            "megatron/test_pretrain.py::test_fully_parallel_save_and_load_resume_bit_for_bit",
        ),
    ),
    Feature(
        "checkpoints of plain models, Megatron's dev and main branches, DeepSeek-V4's mappings",
        YES,
        "converted",
        ("megatron/test_convert_checkpoint.py::test_checkpoint_survives_the_way_there_and_back",),
    ),
    Feature(
        "`--use-megatron-fsdp`: `optim`, `optim_grads`, `optim_grads_params`",
        YES,
        "over gloo; with TP, SP, EP, MTP, recompute and `--fsdp-double-buffer`; "
        "[checkpoints](checkpoints.md#fully-sharded-models); not with a pipeline, in stock neither",
        (
            "distributed/test_fsdp.py::test_sharded_parameters_train_as_one_process_does",
            "distributed/test_fsdp.py::test_megatron_fsdp_trains_as_one_process_does",
            "megatron/test_fsdp_pretrain.py::test_megatron_fsdp_resumes_bit_for_bit",
            "unit/test_options.py::test_fully_sharded_pipeline_is_refused",
        ),
    ),
    Feature(
        "`--use-torch-fsdp2`",
        YES,
        "over gloo; mapping parameters are an fp32 unit; with TP, SP, MoE, MTP and recompute; "
        "[checkpoints](checkpoints.md#fully-sharded-models); not with a pipeline, EP or tied embeddings, in "
        "stock neither",
        (
            "distributed/test_fsdp.py::test_setting_trains_as_one_process_does",
            "distributed/test_fsdp.py::test_mapping_parameters_stay_float32_in_a_bf16_model",
            "distributed/test_fsdp.py::test_fsdp2_resumes_from_its_shards_bit_for_bit",
        ),
    ),
    Feature(
        "`--optimizer-cpu-offload`",
        YES,
        "",
        ("distributed/test_checkpoint.py::test_offloaded_optimizer_resumes_bit_for_bit",),
    ),
    Feature(
        "Muon, also with `--use-distributed-optimizer` (layer-wise)",
        YES,
        "it takes the mappings' projections, Adam their biases and gating factors, as in DeepSeek-V4",
        (
            "distributed/test_muon.py::test_projections_go_to_muon_and_the_rest_of_a_mapping_to_adam",
            "distributed/test_muon.py::test_layout_matches_single_process",
            "distributed/test_muon.py::test_training_resumed_matches_unbroken_run_bit_for_bit",
        ),
    ),
    Feature(
        "`--async-save`",
        YES,
        "",
        ("megatron/test_pretrain.py::test_run_resumed_under_a_switch_equals_the_unbroken_one_bit_for_bit",),
    ),
    Feature(
        "`--use-cpu-initialization`",
        YES,
        "",
        (_PARITY + "core_layout_matches_single_process",),
    ),
    Feature(
        "diagnostics in every layout",
        YES,
        "",
        (
            "distributed/test_diagnostics_parity.py::test_four_rank_layout_reports_what_the_single_process_does",
        ),
    ),
    Feature(
        "generation with a KV cache (static context), also on a pipeline",
        YES,
        "",
        ("distributed/test_inference.py::test_tokens_on_a_pipeline_have_the_logits_of_one_process",),
    ),
    Feature(
        "export to a Hugging Face folder: GQA, MLA, experts, every form of mHC",
        YES,
        "[limits](docs/export.md); the logits of Megatron's local layers within 1e-4, fp32",
        (
            "megatron/test_export.py::test_exported_model_has_logits_and_loss_of_the_trained_one",
            "megatron/test_export.py::test_what_the_exported_model_has_no_form_for_is_refused_by_name",
        ),
    ),
    Feature(
        "apex and Transformer Engine, each there or not",
        YES,
        "",
        ("unit/test_optional_parts.py::test_losses_and_norms_match_those_without_fused_parts",),
    ),
    Feature("FP8 (Transformer Engine)", UNTESTED, "F's linears alone; 50 steps trained by hand on one H100"),
    Feature(
        "`--use-precision-aware-optimizer`; inference engines; Blackwell",
        UNTESTED,
        "",
    ),
    Feature(
        "`--overlap-moe-expert-parallel-comm`",
        REFUSED,
        "but not under `--mhc-pipeline-schedule fused` on a pipeline, which does the same",
        (_REFUSALS + "unsupported_setting_is_refused",),
    ),
    Feature(
        "`--cpu-offloading`, standalone MTP",
        REFUSED,
        "",
        (_REFUSALS + "unsupported_setting_is_refused",),
    ),
    Feature("cross-attention", REFUSED, "", (_REFUSALS + "layer_with_cross_attention_is_refused",)),
    Feature(
        "no decoder layer on stage 0, or on the last stage under MTP",
        REFUSED,
        "streams begin and end there",
        (
            _REFUSALS + "first_stage_without_a_layer_is_refused",
            _REFUSALS + "last_stage_without_a_layer_is_refused_under_mtp_alone",
        ),
    ),
    Feature(
        "PP2 with VPP without overlapped p2p",
        REFUSED,
        "under Megatron's schedule, which swaps messages there",
        (_REFUSALS + "two_stages_with_virtual_ones_need_overlapped_p2p",),
    ),
    Feature(
        "Megatron-Core 0.20 and branches with `hyper_connection.py`",
        REFUSED,
        "their own mHC has the same names",
        ("unit/test_hooks.py::test_core_with_its_own_hyper_connections_is_refused",),
    ),
)
