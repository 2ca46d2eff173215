"""The overlapping schedule on gloo: loss and every gradient against a single process, in float64."""

import dataclasses
import functools

import pytest
import torch
from harness import ON_GPU, Layout, build, iterate
from pipeline import (
    BOUNDARIES,
    ERROR,
    LAYERS,
    SCHEDULES,
    cases,
    check,
    gradients,
    interleaved,
    overlap,
    reference_of,
)

from megatron_mhc import MHCConfig, parallel
from megatron_mhc.pipeline import engine
from megatron_mhc.pipeline.step import layers_of


@pytest.mark.parametrize("vpp", [None, 3])
def test_two_stages(run_ranks, vpp):
    several = cases((3,)) + cases((2,), streams=(1,)) + cases((8,), boundaries=("split",))
    check(run_ranks, 2, Layout(pp=2, vpp=vpp), "dense", several, 6, overrides=dict(num_layers=6))


def test_four_stages(run_ranks):
    check(run_ranks, 4, Layout(pp=4, vpp=3), "dense", cases((5,)))


def test_experts_on_two_ranks(run_ranks):
    """pp 2 x vpp 2 x EP 2: each of two pipelines runs half of the micro-batches."""
    overrides = dict(num_layers=8)
    check(run_ranks, 4, Layout(pp=2, vpp=2, ep=2), "moe_shared", cases((6,)), 8, overrides=overrides)


def test_replayed_streams(run_ranks):
    several = cases((3,), recompute_layer_num="2")
    several += cases((3,), recompute_layer_num="auto", recompute_coefficients=True)
    check(run_ranks, 2, Layout(pp=2, vpp=3), "dense", several, 6, overrides=dict(num_layers=6))


def test_full_recompute_with_whole_messages(run_ranks):
    full = dict(recompute_granularity="full", recompute_num_layers=1, recompute_method="uniform")
    whole = cases((3,), boundaries=("whole",), schedules=("interleaved",))
    check(run_ranks, 2, Layout(pp=2, vpp=2), "dense", whole, 4, overrides=full | dict(num_layers=4))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("vpp", [None, 2, 3])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("replayed", ["off", "auto"])
def test_the_whole_matrix(run_ranks, pp, vpp, kind, schedule, replayed):
    """micro-batches {pp, pp + 1, 4 pp} of each pipeline, n {1, 4}, both boundaries; MoE with EP 2."""
    ep = 2 if kind == "moe" else 1
    counts = [ep * count for count in (pp, pp + 1, 4 * pp)]
    several = cases(counts, streams=(1, 4), schedules=(schedule,), recompute_layer_num=replayed)
    layout = Layout(pp=pp, vpp=vpp, ep=ep)
    layers = LAYERS if LAYERS % (pp * (vpp or 1)) == 0 else 8
    run = functools.partial(run_ranks, timeout=280)
    check(run, pp * ep, layout, kind, several, layers, overrides=dict(num_layers=layers))


STAGES = [["embedding", "decoder"], ["decoder"], ["decoder", "decoder"], ["decoder", "loss"]]
SETTINGS = {
    "tied": (2, Layout(pp=2, vpp=2), "tied", {}, 4),
    "biased": (2, Layout(pp=2), "biased", {}, 4),
    "mla": (2, Layout(pp=2, vpp=2), "mla", {}, 4),
    "mtp": (2, Layout(pp=2, vpp=2), "mtp", {}, 4),
    "moe_auxiliary_loss": (2, Layout(pp=2, vpp=2), "moe_auxiliary_loss", {}, 4),
    "stage_layout": (2, Layout(pp=2, vpp=2), "dense", dict(pipeline_model_parallel_layout=STAGES), 5),
    "selective_recompute": (
        2,
        Layout(pp=2),
        "dense",
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp", "layernorm"]),
        4,
    ),
    "selective_recompute_moe": (
        2,
        Layout(pp=2),
        "moe_shared",
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"]),
        4,
    ),
    "moe_after_dense": (2, Layout(pp=2), "moe_after_dense", {}, 4),
    "tp2_sp": (4, Layout(tp=2, pp=2, sp=True), "moe_shared", {}, 4),
    "cp2": (4, Layout(pp=2, cp=2), "token_local", {}, 4),
}


FAST = ("tied", "moe_auxiliary_loss", "selective_recompute_moe", "tp2_sp")


@pytest.mark.parametrize(
    "setting", [pytest.param(s, marks=[] if s in FAST else pytest.mark.slow) for s in SETTINGS]
)
def test_setting(run_ranks, setting):
    world, layout, kind, overrides, layers = SETTINGS[setting]
    if ON_GPU and "layernorm" in overrides.get("recompute_modules", ()):
        pytest.skip("on a GPU Megatron's recompute of norms takes Transformer Engine; tests/gpu has it")
    overrides = dict(num_layers=layers) | overrides
    check(run_ranks, world, layout, kind, cases((4,)), layers, overrides=overrides)


VARIANTS = [dict(contract="learned_head"), dict(preset="deepseek_v4"), dict(h_res="unconstrained")]


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS)
def test_variant(run_ranks, options):
    split = cases((3,), boundaries=("split",), **options)
    check(run_ranks, 2, Layout(pp=2), "dense", split, 4, overrides=dict(num_layers=4))


def test_loss_alone_on_a_stage(run_ranks):
    """A last chunk without layers; an earlier one is refused under `split`, see test_pipeline_options."""
    overrides = dict(account_for_loss_in_pipeline_split=True)
    several = cases((3,), schedules=("interleaved",))
    check(
        run_ranks,
        2,
        Layout(pp=2, vpp=2),
        "three_layers",
        several,
        3,
        overrides=overrides | dict(num_layers=3),
    )


BARE = {
    "a_rank": (4, Layout(pp=4), [["embedding", "decoder", "decoder"], ["decoder"], [], ["decoder", "loss"]]),
    "a_first_chunk": (
        2,
        Layout(pp=2, vpp=2),
        [["embedding", "decoder", "decoder"], [], ["decoder"] * 2, ["loss"]],
    ),
}


@pytest.mark.parametrize("stage", BARE)
def test_a_stage_without_parameters(run_ranks, stage, monkeypatch):
    monkeypatch.setattr(parallel, "validate_stages", lambda config: None)
    world, layout, stages = BARE[stage]
    whole = cases((5,), boundaries=("whole",), schedules=("interleaved",))
    settings = dict(num_layers=4, pipeline_model_parallel_layout=stages)
    check(run_ranks, world, layout, "dense", whole, 4, overrides=settings)


def returns_a_pair(config, chunks):
    """As Transformer Engine's norm does under --fused-residual-rmsnorm: its output, and what it has read."""
    for chunk in chunks:
        for layer in layers_of(chunk):
            # What main's layers ask their norms when they are built.
            layer._input_layernorm_returns_residual = layer._pre_mlp_layernorm_returns_residual = True
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                alone = norm.forward
                norm.forward = lambda x, alone=alone: (alone(x), x)


@pytest.mark.parametrize("kind", ["dense", "moe_shared"])
@pytest.mark.parametrize("replayed", ["off", "2"])
def test_a_norm_that_returns_its_residual_too(run_ranks, kind, replayed):
    several, settings = cases((4,), recompute_layer_num=replayed), dict(num_layers=4)
    check(run_ranks, 2, Layout(pp=2), kind, several, 4, overrides=settings, prepare=returns_a_pair)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("vpp", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_overlapped_gradient_reduction(run_ranks, vpp, align):
    check(
        run_ranks,
        4,
        Layout(pp=2, vpp=vpp),
        "dense",
        cases((6,)),
        4,
        overrides=dict(num_layers=4),
        prepare=functools.partial(overlap, align),
        ddp=dict(overlap_grad_reduce=True, bucket_size=4000),
    )


def evaluate(layout, mhc, count):
    layout.initialize()
    config = layout.config("dense", num_layers=6)
    chunks = build(layout, config, "dense", mhc)
    config.grad_sync_func = config.param_sync_func = lambda *_: pytest.fail("evaluation synchronises nothing")
    with torch.no_grad():
        loss = iterate(chunks, config, count=count, schedule=engine.forward_backward, forward_only=True)
    return loss, [name for name, g in gradients(chunks).items() if g.abs().max() > 0]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_evaluation(run_ranks, boundary):
    for vpp, count, schedule in ((None, 3, "interleaved"), (3, 5, "fused")):
        layout, mhc = Layout(pp=2, vpp=vpp), interleaved(boundary, schedule)
        loss, touched = run_ranks(2, evaluate, layout, mhc, count)[0]
        assert abs(loss - reference_of("dense", MHCConfig(), count, 6).loss) <= ERROR
        assert touched == []


def under_autocast(layout, layers, count, options):
    """Loss and gradients of an iteration whose forward passes run under autocast, for each mHC options."""
    layout.initialize()
    results = []
    for mhc in options:
        autocast = dict(enable_autocast=True, autocast_dtype=torch.bfloat16, params_dtype=torch.float32)
        config = layout.config("dense", num_layers=layers, **autocast)
        chunks = build(layout, config, "dense", mhc)
        schedule = engine.forward_backward if mhc.pipeline_schedule != "megatron" else None
        results.append((iterate(chunks, config, count=count, schedule=schedule), gradients(chunks)))
    return results


ALL = [(schedule, boundary) for schedule in SCHEDULES for boundary in BOUNDARIES]
INTERPRETED = dict(backend="triton", sinkhorn_iterations=1)


@pytest.mark.parametrize(
    "options, layers, count, kinds",
    [({}, 4, 3, ALL), pytest.param(INTERPRETED, 2, 2, [("fused", "split")], marks=pytest.mark.slow)],
)
def test_autocast_gives_what_megatrons_schedule_gives(run_ranks, options, layers, count, kinds):
    """F's output is bf16, messages and streams fp32; a fused step goes backward amid forward passes.

    Not MoE: without TE Megatron's router does not go backward under autocast.
    """
    megatron = MHCConfig(init="uniform", init_gating_factor=0.5, **options)
    ours = [dataclasses.replace(megatron, pipeline_schedule=s, pp_boundary=b) for s, b in kinds]
    for rank in run_ranks(2, under_autocast, Layout(pp=2), layers, count, [megatron, *ours]):
        (loss, want), *others = rank
        for mhc, (other, got) in zip(ours, others, strict=True):
            assert other == loss, mhc.to_options()
            for name, gradient in want.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
