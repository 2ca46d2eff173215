"""Unsupported combinations raise at build time and name the flag and the remedy."""

import dataclasses
import functools
import re
import types
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_mhc import MHCConfig, carried, door_refusals, parallel, refusals, specs
from megatron_mhc.config import flag
from megatron_mhc.export import settings as export_settings
from megatron_mhc.graphs import Held
from megatron_mhc.hooks.messages import widen_messages
from megatron_mhc.hyper_connection import check_width
from megatron_mhc.layer_refusals import LAYER
from megatron_mhc.pipeline.options import check_config
from megatron_mhc.refusals import HYBRID, refuse


def config(**settings):
    """A small TransformerConfig; `settings` are set after its own checks, as a launch script may."""
    out = TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=2, pipeline_dtype=torch.float32)
    for name, value in settings.items():
        setattr(out, name, value)
    return out


@pytest.mark.parametrize(
    "name, value",
    [
        ("inference_fuse_tp_communication", True),
        ("transformer_impl", "inference_optimized"),
    ],
)
def test_unsupported_setting_is_refused(name, value):
    with pytest.raises(ValueError) as error:
        parallel.validate(config(**{name: value}), MHCConfig())
    assert f"--{name.replace('_', '-')} {value}: " in str(error.value)


OFFLOADED = dict(cpu_offloading=True, cpu_offloading_num_layers=3)
OVERLAP = dict(overlap_moe_expert_parallel_comm=True)


@pytest.mark.parametrize(
    "rows, settings, words",
    [
        ("HYBRID", {}, "--overlap-moe-expert-parallel-comm True in a HybridModel"),
        ("FSDP2", {}, "--use-torch-fsdp2 does not support --overlap-moe-expert-parallel-comm True: "),
        ("MODEL", {}, None),
    ],
)
def test_where_layers_cannot_be_run_in_nodes(rows, settings, words):
    rows = getattr(refusals, rows)
    refusals.refuse(rows, config(**settings), MHCConfig())
    if words is None:
        refusals.refuse(rows, config(**settings, **OVERLAP), MHCConfig())
        return
    with pytest.raises(ValueError, match=words):
        refusals.refuse(rows, config(**settings, **OVERLAP), MHCConfig())


def test_what_layers_offload_is_not_emptied_and_not_run_in_nodes():
    parallel.validate(config(**OFFLOADED), MHCConfig())
    words = "--mhc-recompute-layer-num 2 does not support --cpu-offloading-num-layers 3: "
    with pytest.raises(ValueError, match=words):
        parallel.validate(config(**OFFLOADED), MHCConfig(recompute_layer_num="2"))
    words = "--cpu-offloading-num-layers 3 with --overlap-moe-expert-parallel-comm: "
    with pytest.raises(ValueError, match=words):
        parallel.validate(config(**OFFLOADED, **OVERLAP), MHCConfig())


@pytest.mark.parametrize(
    "held, attention, settings, words",
    [
        (True, True, dict(cuda_graph_impl="local"), "--cuda-graph-impl local with --overlap-moe-expert"),
        (
            False,
            False,
            {},
            "--overlap-moe-expert-parallel-comm True does not support layers without attention",
        ),
    ],
)
def test_layers_that_nodes_cannot_run(held, attention, settings, words):
    def layer(**more):
        return types.SimpleNamespace(
            held=Held(attention=held, mlp=False, router=False),
            connections=lambda: [None, None],
            chunk=types.SimpleNamespace(each=2),
            self_attention_hyper_connection="a connection" if attention else None,
            self_attention=None,
            recompute_input_layernorm=False,
            config=config(**settings, **more),
        )

    refusals.refuse(LAYER, layer(), MHCConfig())
    with pytest.raises(ValueError, match=words):
        refusals.refuse(LAYER, layer(**OVERLAP), MHCConfig())


def test_fp32_streams_are_refused_under_the_kernels_that_take_bf16():
    settings = config(fp32_residual_connection=True)
    with pytest.raises(ValueError, match="hopper does not support --fp32-residual-connection True"):
        parallel.validate(settings, MHCConfig(backend="hopper"))
    parallel.validate(settings, MHCConfig())


def test_a_layernorm_is_not_folded():
    settings = config(normalization="LayerNorm")
    with pytest.raises(ValueError, match="--mhc-norm folded does not support --normalization LayerNorm: "):
        parallel.validate(settings, MHCConfig(norm="folded"))
    parallel.validate(settings, MHCConfig(norm="auto"))


@pytest.mark.parametrize(
    "options, words",
    [
        (
            dict(recompute_layer_num="2"),
            "--mhc-recompute-layer-num 2 .* --fine-grained-activation-offloading",
        ),
        (dict(num_residual_streams=1, h_pre="fixed"), "--offload-modules attn_norm with"),
        (
            dict(pipeline_schedule="interleaved"),
            "interleaved does not .* --fine-grained-activation-offloading",
        ),
    ],
)
def test_offloading_is_refused_where_mhc_reads_what_it_frees(options, words):
    settings = config(fine_grained_activation_offloading=True, offload_modules=["core_attn", "attn_norm"])
    mhc = MHCConfig(**options)
    with pytest.raises(ValueError, match=words):
        parallel.validate(settings, mhc)
        check_config(settings, mhc)
    parallel.validate(settings, MHCConfig())


@pytest.mark.parametrize("impl", ["none", "local", "transformer_engine", "full_iteration"])
def test_graphs_are_refused_under_the_overlapping_schedules_of_a_pipeline(impl):
    overlapped = MHCConfig(pipeline_schedule="interleaved")
    for settings in (config(cuda_graph_impl=impl), config(cuda_graph_impl=impl, **TWO_STAGES)):
        parallel.validate(settings, MHCConfig(log_interval=5))
        check_config(settings, MHCConfig())
    check_config(config(cuda_graph_impl=impl), overlapped)  # on one stage Megatron's own schedule runs
    if impl == "none":
        check_config(settings, overlapped)
        return
    with pytest.raises(ValueError, match=f"interleaved does not support --cuda-graph-impl {impl} on a pipe"):
        check_config(settings, overlapped)


TWO_STAGES = dict(pipeline_model_parallel_size=2)


def test_the_spec_of_a_gpt_is_refused_for_a_hybrid_model():
    with pytest.raises(ValueError, match="--hybrid-layer-pattern is of a HybridModel.* hybrid_mhc_spec"):
        specs.wrap_block_spec(get_gpt_layer_local_spec(), MHCConfig(), config(is_hybrid_model=True))


@pytest.mark.parametrize(
    "options, settings, words",
    [
        (dict(pipeline_schedule="fused"), {}, "--mhc-pipeline-schedule fused .* does not support a Hybrid"),
        (dict(pipeline_schedule="interleaved", pp_boundary="split"), {}, "split does not support a Hybrid"),
        ({}, dict(cuda_graph_impl="local"), "--cuda-graph-impl local in a HybridModel"),
        (
            {},
            dict(cuda_graph_impl="transformer_engine"),
            "engine in a HybridModel.*full_iteration",
        ),
        ({}, dict(cuda_graph_impl="full_iteration"), None),
        (dict(pipeline_schedule="interleaved"), {}, None),
    ],
)
def test_what_takes_layers_for_pairs_is_refused_in_a_hybrid_model(options, settings, words):
    settings = config(is_hybrid_model=True, **settings)
    if words is None:
        refusals.refuse(refusals.HYBRID, settings, MHCConfig(**options))
        return
    with pytest.raises(ValueError, match=words):
        refusals.refuse(refusals.HYBRID, settings, MHCConfig(**options))


def test_first_stage_without_a_layer_of_the_pattern_is_refused():
    for stack, refused in (
        (dict(pre_process=True, layer_type_list=[]), True),
        (dict(pre_process=False, layer_type_list=[]), False),
        (dict(pre_process=True, layer_type_list=["*"]), False),
    ):
        found = list(refusals.refused(refusals.STACK, types.SimpleNamespace(**stack), MHCConfig()))
        assert [("in front of its first |" in str(error)) for error in found] == [True] * refused


@pytest.mark.parametrize(
    "name", ["sft", "fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking"]
)
def test_what_the_entry_point_lacks_is_refused(name):
    with pytest.raises(
        ValueError, match=f"--{name.replace('_', '-')} is not supported .* megatron_mhc.launch"
    ):
        refusals.refuse(door_refusals.ENTRY_POINT, types.SimpleNamespace(**{name: True}))
    refusals.refuse(door_refusals.ENTRY_POINT, types.SimpleNamespace(**{name: False}))


def test_a_refusal_that_names_flags_says_how_the_environment_writes_them():
    with pytest.raises(ValueError) as error:
        parallel.validate(config(normalization="LayerNorm"), MHCConfig(norm="folded"))
    assert "MEGATRON_MHC and YAML files write" in "".join(error.value.__notes__)
    with pytest.raises(ValueError) as error:
        parallel.validate(config(inference_fuse_tp_communication=True), MHCConfig())
    assert not hasattr(error.value, "__notes__")


def test_every_flag_that_the_package_names_exists():
    names = {flag(option.name) for option in dataclasses.fields(MHCConfig)}
    for file in Path(refusals.__file__).parent.rglob("*.py"):
        named = set(re.findall("--mhc-[a-z-]*[a-z]", file.read_text()))
        assert named <= names, (file.name, named - names)


def test_default_configuration_is_accepted():
    parallel.validate(config(), MHCConfig())
    parallel.validate_stages(config())


@pytest.mark.parametrize(
    "overlap, batch, refused",
    [(False, True, True), (False, False, True), (True, True, True), (True, False, False)],
)
def test_two_stages_with_virtual_ones_need_overlapped_p2p(overlap, batch, refused):
    settings = config(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        overlap_p2p_comm=overlap,
        batch_p2p_comm=batch,
    )
    if not refused:
        parallel.validate(settings, MHCConfig())
        return
    with pytest.raises(ValueError, match="overlap_p2p_comm=True and batch_p2p_comm=False"):
        parallel.validate(settings, MHCConfig())


def test_other_pipeline_depths_need_no_overlap():
    settings = config(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    parallel.validate(settings, MHCConfig())


def test_first_stage_without_a_layer_is_refused():
    settings = config(
        num_layers=1, pipeline_model_parallel_size=2, account_for_embedding_in_pipeline_split=True
    )
    with pytest.raises(ValueError, match="stage 0 has none: drop --account-for-embedding-in-pipeline-split"):
        parallel.validate_stages(settings)


def test_depths_between_streams_do_not_start_from_a_plain_model():
    settings = config(mtp_num_layers=1)
    words = (
        "--mhc-load-dense with --mhc-mtp multistream and --mtp-num-layers: .*use --mhc-mtp single, or drop"
    )
    with pytest.raises(ValueError, match=words):
        parallel.validate(settings, MHCConfig(mtp="multistream", load_dense=True))
    parallel.validate(settings, MHCConfig(load_dense=True))
    parallel.validate(config(), MHCConfig(mtp="multistream", load_dense=True))


def test_depths_between_streams_are_refused_in_megatrons_combined_1f1b():
    settings = config(mtp_num_layers=1)
    settings.overlap_moe_expert_parallel_comm = True
    words = (
        "--overlap-moe-expert-parallel-comm with --mhc-mtp multistream and --mtp-num-layers 1: .*mtp single"
    )
    with pytest.raises(ValueError, match=words):
        parallel.validate(settings, MHCConfig(mtp="multistream"))
    parallel.validate(settings, MHCConfig())
    with pytest.raises(ValueError, match=words):  # without a pipeline it is Megatron's in any case
        parallel.validate(settings, MHCConfig(mtp="multistream", pipeline_schedule="fused"))
    settings.mtp_num_layers = 0
    parallel.validate(settings, MHCConfig(mtp="multistream"))
    settings.mtp_num_layers, settings.pipeline_model_parallel_size = 1, 2
    parallel.validate(settings, MHCConfig(mtp="multistream", pipeline_schedule="fused"))


def test_depths_between_streams_are_refused_in_a_hybrid_model():
    with pytest.raises(ValueError, match="--mhc-mtp multistream does not support a HybridModel.*mtp single"):
        refuse(HYBRID, config(mtp_num_layers=1), MHCConfig(mtp="multistream"))
    refuse(HYBRID, config(mtp_num_layers=1), MHCConfig())
    refuse(HYBRID, config(), MHCConfig(mtp="multistream"))


def test_recomputed_mlp_with_biases_is_refused():
    settings = config(recompute_granularity="selective", recompute_modules=["mlp"], add_bias_linear=True)
    with pytest.raises(ValueError, match="add --disable-bias-linear"):
        parallel.validate(settings, MHCConfig())
    settings.add_bias_linear = False
    parallel.validate(settings, MHCConfig())


FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(mtp_num_layers=1, recompute_num_layers=2), "--recompute-num-layers 2 with --mtp-num-layers"),
        (
            dict(mtp_num_layers=2, distribute_saved_activations=True),
            "--distribute-saved-activations with --mtp-num-layers 2",
        ),
        (dict(recompute_num_layers=2), None),
        (dict(mtp_num_layers=1, distribute_saved_activations=True), None),
        (dict(mtp_num_layers=2), None),
        (
            dict(fine_grained_activation_offloading=True),
            "full with --fine-grained-activation-offloading True",
        ),
        (dict(mtp_num_layers=1, recompute_num_layers=2, recompute_method="block"), None),
    ],
)
def test_full_recompute_that_stops_in_stocks_first_step_is_refused(settings, words):
    settings = config(**FULL | settings)
    if words is None:
        parallel.validate(settings, MHCConfig())
        return
    with pytest.raises(ValueError, match=words):
        parallel.validate(settings, MHCConfig())


def test_two_configurations_in_one_model_are_refused():
    settings = config()
    settings.mhc = MHCConfig(num_residual_streams=2)
    with pytest.raises(ValueError, match="two mHC configurations in one model"):
        carried.remember(settings, MHCConfig())


def test_layer_of_another_class_is_refused():
    class Other(TransformerLayer):
        pass

    with pytest.raises(ValueError, match="cannot wrap layers of Other"):
        specs.wrap_layer_spec(ModuleSpec(module=Other), MHCConfig())


def test_layer_with_cross_attention_is_refused():
    spec = get_gpt_layer_local_spec()
    spec.submodules.cross_attention = spec.submodules.self_attention
    with pytest.raises(ValueError, match="cross_attention"):
        specs.wrap_layer_spec(spec, MHCConfig())


def test_block_without_final_norm_is_refused():
    spec = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec()])
    with pytest.raises(ValueError, match="no layer_norm"):
        specs.wrap_block_spec(spec, MHCConfig(), config())


def test_wrapping_leaves_the_original_spec_alone():
    spec = get_gpt_layer_local_spec()
    attention_bda, params = spec.submodules.self_attn_bda, dict(spec.params)
    wrapped = specs.wrap_layer_spec(spec, MHCConfig())
    assert wrapped is not spec and specs.wrap_layer_spec(wrapped, MHCConfig()) is wrapped
    assert spec.submodules.self_attn_bda is attention_bda and spec.params == params


def test_hidden_states_of_another_width_are_refused():
    with pytest.raises(ValueError, match="layer 3: hidden states are 16 wide, expected 64"):
        check_width(torch.zeros(2, 1, 16), 64, "layer 3")


@pytest.mark.parametrize("sent, received, what", [(16, 64, "sent"), (64, 16, "received")])
def test_pipeline_message_of_another_width_is_refused(sent, received, what):
    def stock(self, *, tensor_shape, **_):
        assert tensor_shape == (8, 1, 64)
        return torch.zeros(8, 1, received), None, None

    settings = config()
    settings.mhc = MHCConfig()
    communicator = types.SimpleNamespace(config=settings)
    with pytest.raises(ValueError, match=f"message {what} with shape"):
        widen_messages(stock)(
            communicator,
            tensor_send_next=torch.zeros(8, 1, sent),
            tensor_send_prev=None,
            recv_prev=True,
            recv_next=False,
            tensor_shape=(8, 1, 16),
        )


def test_of_messages_of_any_length_the_width_alone_is_checked():
    def stock(self, **_):
        return torch.zeros(5, 1, 64), None, None

    settings = config(variable_seq_lengths=True)
    settings.mhc = MHCConfig()
    send = functools.partial(
        widen_messages(stock),
        types.SimpleNamespace(config=settings),
        tensor_send_prev=None,
        recv_prev=True,
        recv_next=False,
    )
    for shape in ((), (8, 1, 16)):  # without and with virtual stages
        send(tensor_send_next=torch.zeros(3, 1, 64), tensor_shape=shape)
        with pytest.raises(ValueError, match=r"message sent with shape \(3, 1, 16\), expected \('...', 64\)"):
            send(tensor_send_next=torch.zeros(3, 1, 16), tensor_shape=shape)


def test_pipeline_message_of_a_plain_model_is_left_alone():
    def stock(self, **arguments):
        return arguments["tensor_shape"], None, arguments["wait_on_reqs"]

    communicator = types.SimpleNamespace(config=config())
    arguments = dict(tensor_send_next=None, tensor_send_prev=None, recv_prev=True, recv_next=False)
    shape = [8, 1, 16]
    got = widen_messages(stock)(communicator, **arguments, tensor_shape=shape, wait_on_reqs=False)
    assert got[0] is shape and got[2] is False
    assert P2PCommunicator._communicate.__module__.startswith(("megatron.core", "megatron_mhc"))


def test_the_gated_residual_is_refused_where_norms_of_a_plain_model_are_loaded_or_written():
    mhc = MHCConfig(preset="qwen4_exp")
    with pytest.raises(ValueError, match="preset=qwen4_exp has no norms .*: build .* or use preset=paper"):
        refusals.refuse(door_refusals.BRIDGE, None, mhc)
    with pytest.raises(ValueError, match="--mhc-contract library: the exported model has no such part"):
        export_settings.check_form(MHCConfig(contract="library"))
    export_settings.check_form(mhc)
