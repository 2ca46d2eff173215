"""How many passes a rank holds: what recompute plans with is what the schedule's program does."""

import itertools
import types

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig
from megatron_mhc.recompute import chunk, estimate
from megatron_mhc.schedule.check import check_programs, peak_in_flight
from megatron_mhc.schedule.plans import OVERLAPPED, passes_in_flight, plan_for
from megatron_mhc.schedule.program import build_program

MEGATRON = MHCConfig()
SHAPES = list(itertools.product([2, 4, 8], [1, 2, 3]))


def config(pp, vpp, **settings):
    settings = dict(num_layers=2 * pp * vpp, hidden_size=16, num_attention_heads=2) | settings
    return TransformerConfig(
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        **settings,
    )


def settings_of(pp, vpp):
    """(micro-batches, micro_batch_group_size_per_vp_stage)"""
    for count in (1, pp - 1, pp, pp + 1, 2 * pp, 3 * pp + 1, 6 * pp):
        yield count, None
    if vpp > 1:
        yield from ((4 * pp, pp + 1), (6 * pp, 2 * pp))


@pytest.mark.parametrize("schedule", OVERLAPPED)
@pytest.mark.parametrize("boundary", ["whole", "split"])
@pytest.mark.parametrize("pp, vpp", SHAPES)
def test_recompute_counts_what_the_program_holds(pp, vpp, boundary, schedule):
    for count, group in settings_of(pp, vpp):
        made = config(pp, vpp, microbatch_group_size_per_vp_stage=group)
        for replayed in ("off", "auto"):
            mhc = MHCConfig(pipeline_schedule=schedule, pp_boundary=boundary, recompute_layer_num=replayed)
            plan = plan_for(made, mhc, pp, vpp, count)
            for rank in range(pp):
                assert passes_in_flight(made, mhc, rank, count) == peak_in_flight(build_program(plan, rank))


@pytest.mark.parametrize("pp, vpp", SHAPES)
def test_recompute_counts_what_megatrons_schedule_holds(pp, vpp):
    for count, group in settings_of(pp, vpp):
        made = config(pp, vpp, microbatch_group_size_per_vp_stage=group)
        if vpp > 1 and (count < pp or count % (group or pp)):
            continue  # Megatron refuses a step of less than a group, and a small remainder
        for rank in range(pp):
            communicator = types.SimpleNamespace(
                pp_group=types.SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank),
                virtual_pipeline_model_parallel_size=made.virtual_pipeline_model_parallel_size,
            )
            total, _, warm, _ = get_pp_rank_microbatches(
                count, vpp, group or pp, p2p_communicator=communicator
            )
            assert passes_in_flight(made, MEGATRON, rank, count) == min(total, warm + 1)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_megatrons_1f1b_is_a_program_too(pp):
    plan = plan_for(config(pp, 1), MEGATRON, pp, 1, 2 * pp)
    check_programs(plan)
    assert [peak_in_flight(build_program(plan, rank)) for rank in range(pp)] == list(range(pp, 0, -1))


@pytest.mark.parametrize(
    "pp, vpp, schedule, held",
    [(1, 1, "fused", 1), (8, 1, "megatron", 8), (8, 1, "interleaved", 15), (8, 1, "fused", 16)]
    + [(4, 1, "interleaved", 7), (4, 2, "megatron", 11), (4, 2, "interleaved", 11), (4, 2, "fused", 12)],
)
def test_the_first_rank_with_as_many_micro_batches_as_it_likes(pp, vpp, schedule, held):
    mhc = MHCConfig(pipeline_schedule=schedule)
    assert passes_in_flight(config(pp, vpp), mhc, 0) == passes_in_flight(config(pp, vpp), mhc, 0, 96) == held


def test_blocks_and_tables_are_planned_for_the_schedule_that_runs(monkeypatch):
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    made = config(8, 1)
    for schedule, held in (("megatron", 8), ("interleaved", 15), ("fused", 16)):
        mhc = MHCConfig(pipeline_schedule=schedule, recompute_layer_num="auto")
        monkeypatch.setattr(chunk, "get_num_microbatches", lambda: 32)
        assert chunk.held_on_this_rank(made, mhc) == held
        ranks = estimate.ranks(made, mhc, 32, 1, 32)
        assert [r.in_flight for r in ranks] == [passes_in_flight(made, mhc, rank, 32) for rank in range(8)]
        stock = estimate.ranks(made, MHCConfig(recompute_layer_num="auto"), 32, 1, 32)
        assert [r.vanilla for r in ranks] == [r.vanilla for r in stock]  # it has Megatron's schedule
