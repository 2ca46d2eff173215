"""`--mhc-pipeline-schedule auto`: what it takes of what was measured, and of what is refused."""

import dataclasses
import types

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig, hooks
from megatron_mhc.pipeline import auto, forms, links, probe, queues
from megatron_mhc.pipeline.forms import FORMS, PLAINEST, STOCK, Form, Link, fastest, obstacle
from megatron_mhc.pipeline.layer_times import Launch, Layer, Machine, layer_of, times_of

AUTO = MHCConfig(pipeline_schedule="auto")
WHOLE, SPLIT = PLAINEST, Form("interleaved", "split")
FUSED, BOTH = Form("fused", "whole"), Form("fused", "split")
LAUNCH = Launch(4096, 2, 8)
PUSHED, NCCL = Link(True, True, "pushed"), Link(False, True, "over nccl")


def config(width=2560, layers=8, pp=2, vpp=2, **settings):
    """The dense model of `python -m benchmarks.multi_gpu`; `settings` are set after Megatron's checks."""
    out = TransformerConfig(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=width // 128,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    for name, value in settings.items():
        setattr(out, name, value)
    return out


def moe(**settings):
    experts = dict(num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=1536)
    return config(**dict(expert_model_parallel_size=2) | experts | settings)


def allowed(settings, mhc=AUTO, launch=LAUNCH):
    return [form for form in FORMS if not obstacle(settings, mhc, launch, form)]


# Two GPUs, PP2 x VPP2: (width, layers, n, microbatch, microbatches, link, GB/s) and the measured steps, ms.
# `push` and `nvlink`: docs/experiments/2026-11-30_push_transport/schedules.json. The others are
# docs/results/multi_gpu_{nvlink,nvlink_4096_h200,nvlink_2560_n1_h200,sockets_h200}.json of commit cec2cd9.
# GB/s: what a message of Megatron's takes on an idle link.
MEASURED = {
    "push": ((2560, 8, 4, 2, 8, PUSHED, 364), {STOCK: 366.3, WHOLE: 358.2}),
    "nvlink": ((2560, 8, 4, 2, 8, NCCL, 364), {STOCK: 366.3, WHOLE: 381.3}),
    "nvlink_2560_n4": ((2560, 4, 4, 4, 8, NCCL, 364), {STOCK: 361, WHOLE: 402, SPLIT: 403, BOTH: 407}),
    "nvlink_4096_n4": (
        (4096, 4, 4, 2, 8, NCCL, 364),
        {STOCK: 383, WHOLE: 411, SPLIT: 412, FUSED: 424, BOTH: 419},
    ),
    "nvlink_4096_n1": (
        (4096, 4, 1, 2, 8, NCCL, 364),
        {STOCK: 362, WHOLE: 384, SPLIT: 387, FUSED: 390, BOTH: 394},
    ),
    "nvlink_2560_n1": (
        (2560, 4, 1, 4, 8, NCCL, 364),
        {STOCK: 324, WHOLE: 350, SPLIT: 352, FUSED: 355, BOTH: 359},
    ),
    "sockets_2560_n4": ((2560, 4, 4, 2, 4, NCCL, 3.9), {STOCK: 907, WHOLE: 655, SPLIT: 795}),
    "sockets_4096_n4": ((4096, 4, 4, 2, 4, NCCL, 3.3), {STOCK: 1462, WHOLE: 1228, SPLIT: 1448}),
    "sockets_2560_n1": ((2560, 4, 1, 2, 4, NCCL, 3.9), {STOCK: 255, WHOLE: 218, SPLIT: 327}),
    "sockets_4096_n1": ((4096, 4, 1, 2, 4, NCCL, 3.6), {STOCK: 465, WHOLE: 373, SPLIT: 528}),
}


@pytest.mark.parametrize("tflops", [620, 723, 850])
@pytest.mark.parametrize("row", MEASURED)
def test_auto_takes_what_was_measured_to_be_fastest(row, tflops):
    """Also where the GEMMs are a sixth slower or faster than those of an H200."""
    (width, layers, n, batch, count, link, gbs), steps = MEASURED[row]
    model, mhc = config(width, layers), dataclasses.replace(AUTO, num_residual_streams=n)
    launch, way = Launch(4096, batch, count), lambda: (link, Machine(tflops * 1e12, gbs, gbs))
    obstacles = {form: None if form in steps else "not measured" for form in FORMS}
    assert fastest(model, mhc, launch, obstacles, way).form == min(steps, key=steps.get)


@pytest.mark.parametrize("row", MEASURED)
def test_simulated_steps_are_as_far_from_each_other_as_measured_ones(row):
    (width, layers, n, batch, count, link, gbs), steps = MEASURED[row]
    mhc, launch, machine = (
        MHCConfig(num_residual_streams=n),
        Launch(4096, batch, count),
        Machine(723e12, gbs, 1),
    )
    found = {
        f: forms.step_of(config(width, layers), f.of(mhc), launch, link, machine) for f in (STOCK, WHOLE)
    }
    # Sockets vary: other runs of sockets_2560_n4 have 0.91 where this one has 0.72.
    tolerance = 0.25 if row.startswith("sockets") else 0.05
    assert found[WHOLE] / found[STOCK] == pytest.approx(steps[WHOLE] / steps[STOCK], abs=tolerance)
    assert 0.7 < found[STOCK] / steps[STOCK] < 1.1


@pytest.mark.parametrize("row", [row for row, (_, steps) in MEASURED.items() if BOTH in steps])
def test_cut_chunks_and_nodes_cost_what_they_were_measured_to(row):
    (width, layers, n, batch, count, link, gbs), steps = MEASURED[row]
    mhc, launch, machine = (
        MHCConfig(num_residual_streams=n),
        Launch(4096, batch, count),
        Machine(723e12, gbs, 1),
    )
    found = {f: forms.step_of(config(width, layers), f.of(mhc), launch, link, machine) for f in steps}
    for plainer, form in {(WHOLE, SPLIT), (SPLIT, BOTH)} | ({(WHOLE, FUSED)} if FUSED in steps else set()):
        longer = (steps[form] - steps[plainer]) / steps[STOCK]
        assert (found[form] - found[plainer]) / found[STOCK] == pytest.approx(longer, abs=0.025)


@pytest.mark.parametrize(
    "steps, taken",
    [
        ((100, 98.1, 98.1), STOCK),
        ((100, 97.9, 96.1), WHOLE),
        ((100, 97.9, 95.5), SPLIT),
        ((100, 98.1, 97.9), SPLIT),
    ],
)
def test_a_plainer_form_is_kept_inside_the_margin(monkeypatch, steps, taken):
    given = dict(zip((STOCK, WHOLE, SPLIT), steps, strict=True))
    monkeypatch.setattr(
        forms,
        "step_of",
        lambda config, mhc, *_: given[Form(mhc.pipeline_schedule, mhc.pp_boundary)],
    )
    obstacles = {form: None if form in given else "not given" for form in FORMS}
    form, why = fastest(config(), AUTO, LAUNCH, obstacles, lambda: (PUSHED, Machine(7e14, 375, 375)))
    assert form == taken
    assert "interleaved whole 9" in why and "messages of 168 MB pushed at 375 GB/s" in why


@pytest.mark.parametrize(
    "settings, mhc, launch, expected",
    [
        (config(), AUTO, LAUNCH, [STOCK, WHOLE, SPLIT]),
        (moe(), AUTO, LAUNCH, list(FORMS)),
        (moe(expert_model_parallel_size=1), AUTO, LAUNCH, [STOCK, WHOLE, SPLIT]),
        (moe(), MHCConfig(pipeline_schedule="auto", pp_boundary="whole"), LAUNCH, [STOCK, WHOLE, FUSED]),
        (config(), MHCConfig(pipeline_schedule="auto", pp_boundary="split"), LAUNCH, [STOCK, SPLIT]),
        (config(variable_seq_lengths=True), AUTO, LAUNCH, [STOCK]),
        (moe(recompute_granularity="full"), AUTO, LAUNCH, [STOCK, WHOLE]),
        (moe(heterogeneous_block_specs=True), AUTO, LAUNCH, [STOCK, WHOLE]),
        (moe(moe_token_dispatcher_type="flex"), AUTO, LAUNCH, [STOCK, WHOLE, SPLIT]),
        (config(microbatch_group_size_per_vp_stage=16), AUTO, LAUNCH, [STOCK]),
        # Megatron's own schedule stops, exchanges the wrong tensors, or leaves weight gradients.
        (config(), AUTO, Launch(4096, 2, 7), [WHOLE, SPLIT]),
        (config(), AUTO, Launch(4096, 2, 8, (4, 7)), [WHOLE, SPLIT]),
        (config(microbatch_group_size_per_vp_stage=4), AUTO, Launch(4096, 2, 8, (2,)), [STOCK]),
        (config(overlap_p2p_comm=False, batch_p2p_comm=True), AUTO, LAUNCH, [WHOLE, SPLIT]),
        (moe(delay_wgrad_compute=True, overlap_moe_expert_parallel_comm=True), AUTO, LAUNCH, list(FORMS[3:])),
    ],
)
def test_what_is_refused_is_no_form_to_choose(settings, mhc, launch, expected):
    assert allowed(settings, mhc, launch) == expected


@pytest.mark.parametrize("count", [7, 200, 201])
def test_steps_of_any_number_of_microbatches_are_simulated(count):
    for form in allowed(moe(), AUTO, Launch(4096, 1, count)):
        step = forms.step_of(moe(), form.of(AUTO), Launch(4096, 1, count), NCCL, Machine(7e14, 364, 364))
        assert 0 < step < 1e4


@pytest.fixture
def chosen(monkeypatch):
    """`resolved` of a rank of a world that says the same on all ranks, and of what it was asked."""
    asked = []
    monkeypatch.setattr(auto, "_said", [])
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda **_: "a group")
    monkeypatch.setattr(probe, "everywhere", lambda value: asked.append(value) or [value, value])
    monkeypatch.setattr(auto.dist, "get_backend", lambda _: "nccl")
    monkeypatch.setattr(links, "choose", lambda *_, **__: links.Choice("push", "one host"))
    monkeypatch.setattr(probe, "machine_of", lambda *_: Machine(723e12, 364, 364))
    monkeypatch.asked = asked
    return monkeypatch


def test_what_was_chosen_stands_in_the_report_and_is_what_a_config_gets_again(chosen):
    model = config()
    taken = auto.resolved(model, AUTO, LAUNCH)
    assert taken == WHOLE.of(AUTO)
    with hooks.register() as handle:
        report = handle.report()
    said = (
        "mHC pipeline schedule: interleaved whole, by --mhc-pipeline-schedule auto: simulated steps in ms: "
    )
    assert f"{said}megatron " in report
    model.mhc = taken
    chosen.setattr(probe, "everywhere", pytest.fail)
    assert auto.resolved(model, AUTO, LAUNCH) is taken
    assert auto.resolved(model, MHCConfig(), LAUNCH) == MHCConfig()  # a schedule that is named is taken


@pytest.mark.parametrize(
    "model, launch, words",
    [
        (config(pp=1, vpp=None), LAUNCH, "one stage"),
        (config(vpp=None), LAUNCH, "no virtual stages"),
        (config(), None, "microbatches are not known"),
        (config(variable_seq_lengths=True), LAUNCH, "does not support variable_seq_lengths=True"),
    ],
)
def test_megatrons_schedule_and_no_error_where_nothing_can_be_chosen(chosen, model, launch, words):
    chosen.setattr(probe, "machine_of", pytest.fail)
    assert auto.resolved(model, AUTO, launch) == MHCConfig()
    assert words in auto.decisions()[0]


def test_before_there_are_process_groups_it_is_megatrons(chosen):
    chosen.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda **_: None)
    chosen.setattr(probe, "everywhere", pytest.fail)
    assert auto.resolved(config(), AUTO, LAUNCH) == MHCConfig()


def test_what_one_rank_cannot_do_none_does(chosen):
    """A queue too few on another rank; its own environment is no part of the answer."""
    chosen.setenv(queues.VARIABLE, "32")
    other = [None, *["rank 1 has one queue"] * (len(FORMS) - 1)]
    chosen.setattr(probe, "everywhere", lambda value: [value, other])
    assert auto.resolved(config(), AUTO, LAUNCH) == MHCConfig()
    assert auto.decisions()[0].endswith("auto: rank 1 has one queue")


def test_one_queue_over_nccl_and_a_push_that_cannot_be_mean_megatrons(chosen):
    chosen.setenv(queues.VARIABLE, "1")
    chosen.setattr(links, "choose", lambda *_, **__: links.Choice("nccl", "two hosts"))
    assert auto.resolved(config(), AUTO, LAUNCH) == MHCConfig()

    def cannot(*_, **__):
        raise ValueError("--mhc-pipeline-transport push: two hosts")

    chosen.setattr(links, "choose", cannot)
    pushing = dataclasses.replace(AUTO, pipeline_transport="push")
    assert auto.resolved(config(), pushing, LAUNCH) == MHCConfig(pipeline_transport="push")
    assert [said.partition(" auto: ")[2][:24] for said in auto.decisions()] == [
        "--mhc-pipeline-schedule ",
        "--mhc-pipeline-transport",
    ]


def test_a_layers_work_is_counted_for_one_rank():
    """FLOPs of the forward: 2 for each weight and token, and causal scores."""
    width, sequence = 2560, 4096
    tokens = 2 * sequence
    layer = layer_of(config(), LAUNCH)
    assert layer.attention == tokens * (8 * width**2 + 2 * sequence * width)
    assert layer.mlp == tokens * 2 * 9 * width**2
    assert layer.stream == 2 * tokens * width and layer.exchanged == 0
    sharded = config(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True)
    part = layer_of(sharded, LAUNCH)
    assert (part.attention, part.mlp, part.stream) == (layer.attention / 4, layer.mlp / 4, layer.stream / 4)
    half = layer_of(moe(moe_layer_freq=[0, 1] * 4), LAUNCH)
    assert half.mlp == tokens * 2 * 3 * width * (3 * width + 2 * 1536) / 2
    assert (
        half.exchanged == tokens * width * 2 * 2 / 2 / 2
    )  # two experts, half of them elsewhere, half of layers
    times = times_of(layer, 4, Machine(1e15, 100, 100))
    full = times_of(layer, 4, Machine(1e15, 100, 100), full=True)
    assert times.stream == pytest.approx(layer.stream / 1e8)
    assert times.mlp_backward == 2 * times.mlp
    forward = times.attention + times.mlp + times.post
    backwards = (t.attention_backward + t.mlp_backward for t in (full, times))
    assert next(backwards) - next(backwards) == pytest.approx(forward)


def test_sizes_of_a_step_come_from_megatrons_arguments():
    from megatron_mhc.specs import launch_of

    args = types.SimpleNamespace(seq_length=8, micro_batch_size=2, global_batch_size=24, data_parallel_size=3)
    assert launch_of(args) == Launch(8, 2, 4)
    args.step_batch_size_schedule, args.eval_global_batch_size = "0:12 1M:30 8:18", 9
    args.eval_micro_batch_size = 1
    assert launch_of(args) == Launch(8, 2, 5, (2, 3, 3))  # the last size, and then those of evaluation
    args.global_batch_size = None
    assert launch_of(args) is None


def test_rates_are_measured_for_each_dtype_of_a_layer(monkeypatch):
    measured, group = [], object()
    layer = Layer(*[64] * len(Layer._fields))
    monkeypatch.setattr(probe, "_measured", [])
    monkeypatch.setattr(probe, "_gemm", lambda layer, dtype, device: measured.append(dtype) or 1.0)
    monkeypatch.setattr(probe, "_ring", lambda *_: 1.0)
    monkeypatch.setattr(probe, "_all_to_all", lambda *_: 1.0)
    monkeypatch.setattr(probe, "everywhere", lambda rates: [rates, rates])
    monkeypatch.setattr(probe.parallel_state, "get_expert_model_parallel_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: empty(*size))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32):
        probe.machine_of(group, layer, 4, dtype)
    assert measured == [torch.bfloat16, torch.float32]
