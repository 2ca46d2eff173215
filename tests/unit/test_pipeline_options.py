"""What the overlapping schedule refuses, and how a training loop gets it."""

import types

import megatron.training.training as training
import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig, hooks, parallel
from megatron_mhc.hooks import targets
from megatron_mhc.hooks.messages import widen_messages
from megatron_mhc.hooks.schedule import choose_schedule
from megatron_mhc.pipeline import engine, options
from megatron_mhc.schedule.plans import passes_in_flight, plan_for

SPLIT = MHCConfig(pipeline_schedule="interleaved", pp_boundary="split")
WHOLE = MHCConfig(pipeline_schedule="interleaved")


def config(**settings):
    """A small TransformerConfig; `settings` are set after its own checks, as a launch script may."""
    out = TransformerConfig(num_layers=4, hidden_size=16, num_attention_heads=2, pipeline_dtype=torch.float32)
    for name, value in (dict(pipeline_model_parallel_size=2) | settings).items():
        setattr(out, name, value)
    return out


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("variable_seq_lengths", True, "variable_seq_lengths=True: "),  # Megatron has no flag for it
        ("mtp_standalone", True, "--mtp-standalone True: "),
        (
            "num_microbatches_with_partial_activation_checkpoints",
            2,
            "num_microbatches_with_partial_activation_checkpoints=2: ",
        ),
        ("moe_paged_stash", True, "--moe-paged-stash True: "),
        ("hybrid_context_parallel", True, "--hybrid-context-parallel True: "),
    ],
)
def test_unsupported_setting_is_refused(name, value, words):
    with pytest.raises(ValueError) as error:
        options.check_config(config(**{name: value}), WHOLE)
    said = str(error.value)
    assert words in said
    assert "or use --mhc-pipeline-schedule megatron" in said
    options.check_config(config(**{name: value}), MHCConfig())  # Megatron's own schedule is left alone


FUSED = MHCConfig(pipeline_schedule="fused")


@pytest.mark.parametrize(
    "name, value",
    [
        ("recompute_granularity", "full"),
        ("recompute_modules", ["moe"]),
        ("moe_shared_expert_overlap", True),
        ("moe_token_dispatcher_type", "flex"),
        ("overlap_dispatch_backward_with_experts_wgrad", True),
        ("mlp_chunks_for_training", 2),
        ("moe_latent_size", 8),
    ],
)
def test_what_a_fused_layer_cannot_take_apart_is_refused(name, value):
    with pytest.raises(ValueError) as error:
        options.check_config(config(**{name: value}), FUSED)
    said = str(error.value)
    assert "--mhc-pipeline-schedule fused does not support" in said and f"--{name.replace('_', '-')} " in said
    assert "or use --mhc-pipeline-schedule " in said


@pytest.mark.parametrize("mhc", [MHCConfig(), WHOLE, SPLIT], ids=["megatron", "interleaved", "split"])
@pytest.mark.parametrize("pp", [1, 2])
def test_delayed_weight_gradients_that_nobody_would_compute_are_refused(mhc, pp):
    late = config(delay_wgrad_compute=True, pipeline_model_parallel_size=pp)
    words = (
        f"--mhc-pipeline-schedule {mhc.pipeline_schedule} does not support --delay-wgrad-compute True "
        "without --overlap-moe-expert-parallel-comm: .*use --mhc-pipeline-schedule fused, or drop it"
    )
    with pytest.raises(ValueError, match=words):
        options.check_config(late, mhc)


@pytest.mark.parametrize("mhc", [MHCConfig(), FUSED], ids=["megatron", "fused"])
def test_megatrons_combined_schedule_delays_weight_gradients(mhc):
    settings = dict(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True)
    options.check_config(config(**settings, pipeline_model_parallel_size=1), mhc)
    options.check_config(config(**settings, pipeline_model_parallel_size=2), mhc)


def test_nodes_of_layers_are_refused_under_a_schedule_that_runs_whole_ones():
    settings = dict(overlap_moe_expert_parallel_comm=True)
    options.check_config(config(**settings, pipeline_model_parallel_size=1), WHOLE)
    words = "interleaved does not support --overlap-moe-expert-parallel-comm True: .*fused or megatron"
    with pytest.raises(ValueError, match=words):
        options.check_config(config(**settings, pipeline_model_parallel_size=2), WHOLE)


def test_the_combined_schedule_holds_one_pass_more():
    megatron = MHCConfig()

    def held(mhc=megatron, count=None, **settings):
        return passes_in_flight(config(**settings, overlap_moe_expert_parallel_comm=True), mhc, 0, count)

    alone = dict(pipeline_model_parallel_size=1)
    assert (held(**alone), held(count=1, **alone)) == (2, 1)
    stages = dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert held(**stages) == passes_in_flight(config(**stages), megatron, 0) + 1
    assert held(FUSED, **stages) == passes_in_flight(config(**stages), FUSED, 0)


def test_a_fused_pipeline_delays_weight_gradients():
    options.check_config(config(delay_wgrad_compute=True), FUSED)
    alone = config(delay_wgrad_compute=True, pipeline_model_parallel_size=1)
    with pytest.raises(ValueError, match="--delay-wgrad-compute True needs a pipeline or .* or drop it"):
        options.check_config(alone, FUSED)


def test_what_megatron_asks_for_beside_delayed_weight_gradients_goes_with_fused():
    """Its own checks let them pass with overlap_moe_expert_parallel_comm alone."""
    settings = dict(num_layers=4, hidden_size=16, num_attention_heads=2, num_moe_experts=4, bf16=True)
    settings |= dict(params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, add_bias_linear=False)
    settings |= dict(moe_token_dispatcher_type="alltoall", expert_model_parallel_size=2)
    settings |= dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(AssertionError, match="overlap_moe_expert_parallel_comm must be enabled"):
        TransformerConfig(**settings, delay_wgrad_compute=True)
    late = TransformerConfig(**settings, delay_wgrad_compute=True, overlap_moe_expert_parallel_comm=True)
    options.check_config(late, FUSED)


@pytest.mark.parametrize(
    "name, value",
    [("use_transformer_engine_op_fuser", True), ("mtp_use_repeated_layer", True)],
)
def test_what_does_not_go_with_delayed_weight_gradients_is_refused(name, value):
    options.check_config(config(**{name: value}), FUSED)
    words = f"fused with --delay-wgrad-compute does not support --{name.replace('_', '-')} {value}: drop it"
    with pytest.raises(ValueError, match=words):
        options.check_config(config(delay_wgrad_compute=True, **{name: value}), FUSED)


def test_fused_needs_a_layer_on_every_stage_and_trains_alone():
    options.check_config(config(), FUSED)
    empty = config(num_layers_in_first_pipeline_stage=4, num_layers_in_last_pipeline_stage=0)
    options.check_config(empty, WHOLE)
    with pytest.raises(ValueError, match="stage 1 has none: .* or use --mhc-pipeline-schedule interleaved"):
        options.check_config(empty, FUSED)
    uneven = config(num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=1)
    plan = plan_for(uneven, FUSED, 2, 1, 4)
    assert plan.fused and plan.layers == (3, 1)
    assert not plan_for(uneven, FUSED, 2, 1, 4, forward_only=True).fused


def test_split_boundary_needs_its_schedule_and_a_layer_on_every_stage_that_sends():
    with pytest.raises(ValueError, match="--mhc-pp-boundary split needs --mhc-pipeline-schedule interleaved"):
        options.check_config(config(), MHCConfig(pp_boundary="split"))
    full = config(recompute_granularity="full")
    with pytest.raises(
        ValueError, match="does not support --recompute-granularity full.* or --mhc-pp-boundary whole"
    ):
        options.check_config(full, SPLIT)
    options.check_config(full, WHOLE)
    options.check_config(config(), SPLIT)
    uneven = config(num_layers_in_first_pipeline_stage=0, num_layers_in_last_pipeline_stage=4)
    with pytest.raises(ValueError, match="stage 0 has no layer: .*or use --mhc-pp-boundary whole"):
        options.check_config(uneven, SPLIT)


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(decoder_seq_length=8), "--decoder-seq-length 8"),
        (dict(adjust=len), "adjust_tensor_shapes_fn"),
        (dict(communicator=object()), "p2p_communicator"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(call, words):
    given = dict(seq_length=16, decoder_seq_length=None, adjust=None, communicator=None)
    options.check_call(config(), **given)
    with pytest.raises(ValueError, match=f"{words}.*use --mhc-pipeline-schedule megatron"):
        options.check_call(config(), **given | call)
    with pytest.raises(ValueError, match="pipeline_dtype is None"):
        options.check_call(config(pipeline_dtype=None), **given)


def test_plan_follows_the_configuration():
    def plan(mhc=SPLIT, chunks=2, count=8, forward_only=False, **settings):
        return plan_for(config(**settings), mhc, 2, chunks, count, forward_only)

    assert plan(microbatch_group_size_per_vp_stage=2).groups() == [2] * 4
    assert plan(microbatch_group_size_per_vp_stage=4).groups() == [4, 4]
    assert plan(count=1, microbatch_group_size_per_vp_stage=2).groups() == [1]
    assert plan(chunks=1, microbatch_group_size_per_vp_stage=100).boundary == "split"
    replaying = MHCConfig(pipeline_schedule="interleaved", recompute_layer_num="2")
    assert plan(replaying).replay and not plan(replaying, forward_only=True).replay
    with pytest.raises(ValueError, match="virtual-pipeline-stage 9: a step has 8 micro-batches; give 2 to 8"):
        plan(microbatch_group_size_per_vp_stage=9)


def test_two_virtual_stages_need_no_overlapped_p2p_of_megatrons():
    swapping = config(virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=False)
    parallel.validate(swapping, WHOLE)
    with pytest.raises(ValueError, match="wrong tensors"):
        parallel.validate(swapping, MHCConfig())


@pytest.fixture
def registered():
    hooks.revert_all()
    yield hooks.register
    hooks.revert_all()


def test_only_the_flag_replaces_megatrons_schedule(registered):
    original = training.get_forward_backward_func
    registered().revert()
    assert training.get_forward_backward_func is original
    handle = registered(schedule=True)
    assert training.get_forward_backward_func is not original
    assert all(hook.target in handle.report() for hook in targets.SCHEDULE_HOOKS)
    # Without a pipeline it is Megatron's function itself.
    assert (
        training.get_forward_backward_func(pp_size=1, vp_size=None)
        is schedules.forward_backward_no_pipelining
    )
    handle.revert()
    assert training.get_forward_backward_func is original


def model(**settings):
    out = torch.nn.Module()
    out.config = config(**settings)
    return out


def test_a_model_that_did_not_ask_gets_megatrons_schedule_and_all_of_its_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(
        schedules, "forward_backward_pipelining_without_interleaving", lambda **k: calls.append(k)
    )
    monkeypatch.setattr(engine, "forward_backward", lambda **k: calls.append("ours"))
    run = choose_schedule(schedules.get_forward_backward_func)(pp_size=2, vp_size=None)
    for mhc in (None, MHCConfig()):
        given = dict(model=[model(**({} if mhc is None else dict(mhc=mhc)))], forward_only=True, seq_length=7)
        run(**given)
        assert calls.pop() == given
    run(model=model(mhc=WHOLE), seq_length=7)
    assert calls == ["ours"]


def test_a_loop_that_runs_megatrons_schedule_all_the_same_is_stopped():
    communicator = types.SimpleNamespace(config=config(mhc=SPLIT))
    with pytest.raises(ValueError, match="runs Megatron's schedule: let it call .*pipeline.forward_backward"):
        widen_messages(pytest.fail)(
            communicator,
            tensor_send_next=None,
            tensor_send_prev=None,
            recv_prev=True,
            recv_next=False,
            tensor_shape=(2, 1, 16),
        )
