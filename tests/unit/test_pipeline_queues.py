"""One hardware queue for all streams: refused over NCCL, and a model of why."""

import itertools
import types

import pytest
from megatron.core import parallel_state

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import options, queues
from megatron_mhc.pipeline.links import Choice
from megatron_mhc.schedule.program import POST, SEND, SPLIT, WAIT, WHOLE, Plan, build_program, channel

CONFIG = types.SimpleNamespace(
    pipeline_model_parallel_size=2,
    recompute_granularity=None,
    variable_seq_lengths=False,
    cuda_graph_impl="none",
    num_layers=4,
    is_hybrid_model=False,
    overlap_moe_expert_parallel_comm=False,
)
INTERLEAVED = MHCConfig(pipeline_schedule="interleaved")
VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture
def nccl(monkeypatch):
    monkeypatch.setattr(queues.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(queues.links, "choose", lambda *_: Choice("nccl", "two hosts"))
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda *_: "a group")
    return monkeypatch


def test_one_queue_is_refused_over_nccl(nccl):
    nccl.setenv(VARIABLE, "1")
    with pytest.raises(ValueError) as error:
        options.check_config(CONFIG, INTERLEAVED)
    said = str(error.value)
    assert "--mhc-pipeline-schedule interleaved over NCCL (two hosts)" in said and f"{VARIABLE}=1:" in said
    assert f"`export {VARIABLE}=32`" in said and "--mhc-pipeline-schedule megatron" in said
    options.check_config(CONFIG, MHCConfig())


@pytest.mark.parametrize("value", [None, "8", "32"])
def test_more_are_not(nccl, value):
    nccl.delenv(VARIABLE, raising=False)
    if value:
        nccl.setenv(VARIABLE, value)
    options.check_config(CONFIG, INTERLEAVED)


def test_gloo_and_a_model_before_its_groups_are_not_asked(nccl):
    nccl.setenv(VARIABLE, "1")
    queues.check_queues(INTERLEAVED, None)
    nccl.setattr(queues.dist, "get_backend", lambda group: "gloo")
    queues.check_queues(INTERLEAVED, "a group")


def test_nor_are_pushed_messages(nccl):
    nccl.setenv(VARIABLE, "1")
    nccl.setattr(queues.links, "choose", lambda *_: Choice("push", "one host"))
    options.check_config(CONFIG, INTERLEAVED)


def run(plan, one_queue):
    """(whether all programs end, messages that came), where what waits in a queue holds up all behind it.

    Compute ends once it has started. With a queue for each stream, only a WAIT holds up what is behind it.
    """
    programs = [build_program(plan, rank) for rank in range(plan.pp)]
    at, last, begun = [0] * plan.pp, {}, {SEND: set(), POST: set()}

    def came(message):
        return message in begun[SEND] and message in begun[POST]

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                op = program[at[rank]]
                if op.kind == WAIT and not came(op.message):
                    break
                if op.kind in begun:
                    stream = rank, channel(plan, op.message)
                    if one_queue and stream in last and not came(last[stream]):
                        break
                    last[stream] = op.message
                    begun[op.kind].add(op.message)
                at[rank] += 1
                moved = True
    ends = all(i == len(program) for i, program in zip(at, programs, strict=True))
    return ends, len(begun[SEND] & begun[POST])


def test_the_job_that_hung_on_two_gpus():
    """multi_gpu_resume.py's, whose receives were posted two steps ahead then: no message came."""
    plan = Plan(2, 2, 4, boundary=SPLIT, fused=True, layers=2, ahead=2)
    assert run(plan, one_queue=True) == (False, 0)
    assert run(plan, one_queue=False)[0]


@pytest.mark.parametrize("ahead", [None, 1])
def test_posting_later_does_not_mend_it(ahead):
    for fused in (False, True):
        assert not run(Plan(2, 2, 8, boundary=SPLIT, fused=fused, ahead=ahead), one_queue=True)[0]


def test_queues_enough_never_hang():
    for pp, vpp, boundary, fused in itertools.product((2, 4), (1, 2), (WHOLE, SPLIT), (False, True)):
        assert run(Plan(pp, vpp, 2 * pp, boundary=boundary, fused=fused), one_queue=False)[0]
