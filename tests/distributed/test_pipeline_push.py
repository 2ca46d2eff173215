"""Messages pushed into the receiver's memory, which processes of one host stand in for: whole training steps.

What GPUs do beside this (streams, copy engines) is in tests/multi_gpu/test_push.py.
"""

import re
from datetime import timedelta

import pytest
import torch
from harness import Layout, build, iterate
from pipeline import BOUNDARIES, SCHEDULES, cases, check, gradients, interleaved, pipeline_rank
from test_pipeline_lifetime import run as live
from test_pipeline_schedule import BARE
from thinned import each_value

from megatron_mhc import parallel
from megatron_mhc.pipeline import comm, engine
from megatron_mhc.pipeline.step import observers
from megatron_mhc.schedule import program

PUSH = dict(pipeline_transport="push")


@pytest.mark.parametrize("vpp", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_two_stages(run_ranks, vpp):
    several = cases((3,), **PUSH) + cases((2,), streams=(1,), **PUSH)
    several += cases((8,), boundaries=("split",), **PUSH)
    check(run_ranks, 2, Layout(pp=2, vpp=vpp), "dense", several, 6, overrides=dict(num_layers=6))


@pytest.mark.slow
def test_four_stages(run_ranks):
    check(run_ranks, 4, Layout(pp=4, vpp=3), "dense", cases((5,), **PUSH))


def test_experts_on_two_ranks(run_ranks):
    overrides = dict(num_layers=8)
    several = cases((6,), **PUSH)
    check(run_ranks, 4, Layout(pp=2, vpp=2, ep=2), "moe_shared", several, 8, overrides=overrides)


def test_replayed_streams(run_ranks):
    several = cases((3,), recompute_layer_num="2", **PUSH)
    several += cases((3,), recompute_layer_num="auto", recompute_coefficients=True, **PUSH)
    check(run_ranks, 2, Layout(pp=2, vpp=3), "dense", several, 6, overrides=dict(num_layers=6))


@pytest.mark.parametrize("stage", BARE)
def test_a_stage_that_hands_on_what_it_got(run_ranks, stage, monkeypatch):
    """Its message lies in a slot, and goes to another one."""
    monkeypatch.setattr(parallel, "validate_stages", lambda config: None)
    world, layout, stages = BARE[stage]
    whole = cases((5,), boundaries=("whole",), schedules=("interleaved",), **PUSH)
    settings = dict(num_layers=4, pipeline_model_parallel_layout=stages)
    check(run_ranks, world, layout, "dense", whole, 4, overrides=settings)


def test_full_recompute_and_a_tied_embedding(run_ranks):
    full = dict(recompute_granularity="full", recompute_num_layers=1, recompute_method="uniform")
    whole = cases((3,), boundaries=("whole",), schedules=("interleaved",), **PUSH)
    check(run_ranks, 2, Layout(pp=2, vpp=2), "tied", whole, 4, overrides=full | dict(num_layers=4))


def test_tensor_and_sequence_parallel_ranks(run_ranks):
    """Their hosts' CUDA_DEVICE_MAX_CONNECTIONS is 1, as Megatron demands on Hopper."""
    layout = Layout(tp=2, pp=2, sp=True)
    check(run_ranks, 4, layout, "moe_shared", cases((4,), **PUSH), 4, overrides=dict(num_layers=4))


def steps(layout, mhc, kinds):
    """(loss, gradients) of steps of one model: (micro-batches, evaluation)."""
    layout.initialize()
    config = layout.config("dense", num_layers=4)
    chunks = build(layout, config, "dense", mhc)
    ways = []
    observers[:] = [lambda op, step: ways.append(type(step.transport))]
    found = []
    for count, only in kinds:
        with torch.set_grad_enabled(not only):
            schedule = engine.forward_backward
            loss = iterate(chunks, config, count=count, schedule=schedule, forward_only=only)
        found.append((loss, {} if only else gradients(chunks)))
    return found, {way.__name__ for way in ways}


@pytest.mark.parametrize("schedule, boundary", each_value(SCHEDULES, BOUNDARIES))
def test_steps_whose_number_of_micro_batches_changes_with_evaluation_between_them(
    run_ranks, schedule, boundary
):
    """The same bits as over process groups."""
    kinds = [(2, False), (8, False), (3, True), (8, False), (2, False), (9, True)]
    usual, pushed = (
        run_ranks(
            2, steps, Layout(pp=2, vpp=2), interleaved(boundary, schedule, pipeline_transport=way), kinds
        )
        for way in ("nccl", "push")
    )
    for (expected, over), (found, by) in zip(usual, pushed, strict=True):
        assert over == {"GroupTransport"} and by == {"PushTransport"}
        for (loss, mine), (same, other) in zip(found, expected, strict=True):
            assert loss == same and mine.keys() == other.keys()
            assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("failing", [None, program.BACKWARD])
@pytest.mark.parametrize("schedule, boundary", [("interleaved", "whole"), ("fused", "split")])
def test_a_step_frees_itself(run_ranks, schedule, boundary, failing):
    mhc = interleaved(boundary, schedule, recompute_layer_num="2", **PUSH)
    (ended, alive), *_ = run_ranks(2, live, Layout(pp=2, vpp=2), "moe_shared", mhc, failing)
    assert ended in (("InterruptedError", "PipelineError") if failing else ("whole",))
    assert alive == []


def silent():
    """Rank 1 dies in its third forward step; returns rank 0's error."""
    comm.timeout_of = lambda group: timedelta(seconds=2)
    layout = Layout(pp=2)
    layout.initialize()
    config = layout.config("dense", num_layers=4)
    chunks = build(layout, config, "dense", interleaved("split", **PUSH))

    def observe(op, step):
        if pipeline_rank() == 1 and op.kind == program.FORWARD and op.what == program.ALL and op.microbatch:
            raise InterruptedError

    observers[:] = [observe]
    try:
        iterate(chunks, config, count=6, schedule=engine.forward_backward)
    except InterruptedError:
        return "died"
    except comm.PipelineError as error:
        return str(error)


def test_a_neighbour_that_dies_is_named(run_ranks):
    error, _ = run_ranks(2, silent)
    assert re.search(r"pipeline rank 0: message \w+ of micro-batch", error)
    assert "pipeline rank 1 (global rank 1) has failed or was silent for 2 s" in error
