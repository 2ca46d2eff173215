"""Pushed messages without a model: their content, planted faults, silent and disagreeing ranks."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch
from harness import ps

from megatron_mhc.pipeline import comm, links
from megatron_mhc.pipeline.memory import SharedMemory
from megatron_mhc.pipeline.push import PushTransport
from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.pipeline.transport import PipelineError
from megatron_mhc.schedule.program import SPLIT, WHOLE, Plan
from megatron_mhc.testing.messages import drive

SECONDS = 1


def pool(pp):
    comm.timeout_of = lambda group: timedelta(seconds=SECONDS)
    ps.initialize_model_parallel(pipeline_model_parallel_size=pp)
    return links.pool_of(ps.get_pipeline_model_parallel_group())


def shapes(tokens, width):
    wide, narrow = (tokens, 1, 4 * width), (tokens, 1, width + 8)
    return {"streams": wide, "mixed": wide, "d_streams": wide, "write": narrow, "d_write": narrow}


def transport(slots, plan, tokens=3, width=5):
    how = (shapes(tokens, width), torch.float32, torch.device("cpu"), HostStreams())
    return PushTransport(plan, slots.rank, slots, *how)


def steps(pp, vpp, boundary):
    """Wrong messages of steps whose kinds change, and change back."""
    slots, wrong = pool(pp), 0
    kinds = [dict(microbatches=2 * pp), dict(microbatches=pp + 1, forward_only=True), dict(microbatches=1)]
    kinds += [dict(microbatches=3 * pp, fused=True, layers=2), kinds[0], dict(microbatches=3 * pp)]
    for step, kind in enumerate(kinds):
        plan = Plan(pp, vpp, boundary=boundary, **kind)
        for tokens in (3, 7):
            wrong += int(drive(plan, slots.rank, transport(slots, plan, tokens), step))
    return wrong, sum(slots.counts.values())


@pytest.mark.parametrize("boundary", [WHOLE, SPLIT])
@pytest.mark.parametrize("pp, vpp", [(2, 1), (2, 2), (4, 2)])
def test_messages_come_whole_and_stay_until_they_are_let_go_of(run_ranks, pp, vpp, boundary):
    before = set(os.listdir("/dev/shm"))
    found = run_ranks(pp, steps, pp, vpp, boundary)
    assert [wrong for wrong, _ in found] == [0] * pp
    assert len({count for _, count in found}) == 1 and found[0][1] > 0
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("mhc_pipeline_")}


PLAN = Plan(2, 1, 6, forward_only=True)  # rank 0 sends six messages, for which there are three slots


def faulty(fault):
    """(error, wrong messages) of a step in which rank 0 breaks the rules."""
    slots = pool(2)
    step, work = transport(slots, PLAN), None
    memory, places = slots.memory, slots.places
    (lane,) = step.tracks
    until, put = memory.until, memory.put
    if slots.rank == 0:
        if fault == "overwritten":
            memory.until = lambda offset, value: None
        elif fault == "lost":
            memory.put = lambda rank, offset, value: (
                put(rank, offset, value) if (offset, value) != (places.arrived(lane), 6) else None
            )
        elif fault == "wrong number":
            more = {places.arrived(lane): 1}
            memory.put = lambda rank, offset, value: put(rank, offset, value + more.get(offset, 0))
        elif fault == "old message":  # tells of one more than it has sent
            memory.copy = lambda *_: time.sleep(0.2)
            memory.put = lambda rank, offset, value: (
                put(rank, offset, value) if offset == places.arrived(lane) else None
            )
        elif fault == "dead":
            memory.copy = pytest.fail
    elif fault == "overwritten":

        def work(op):
            time.sleep(0.1 if op.microbatch == 0 else 0)

    elif fault == "never lets go":
        memory.put = lambda *_: None
    elif fault == "wrong number":
        memory.until = until
    start = time.monotonic()
    try:
        wrong = drive(PLAN, slots.rank, step, 0, work or (lambda op: None))
        return None, int(wrong), time.monotonic() - start
    except PipelineError as error:
        return str(error), None, time.monotonic() - start
    except BaseException as error:  # the rank that a test has fail
        return type(error).__name__, None, 0.0


WRONG = r"pipeline rank 1: message streams of micro-batch \d, stage 0, (was overwritten while|came too early)"
LATE = (
    "pipeline rank 1: message streams of micro-batch 5, stage 0, did not come: pipeline rank 0 .global rank 0"
)
FULL = "pipeline rank 0: message streams of micro-batch 3, stage 0, was not received: pipeline rank 1 .global"


def test_without_a_fault_there_is_no_error(run_ranks):
    assert [found[:2] for found in run_ranks(2, faulty, None)] == [(None, 0), (None, 0)]


@pytest.mark.parametrize(
    "fault, rank, words",
    [
        ("overwritten", 1, WRONG),
        ("wrong number", 1, WRONG),
        ("old message", 1, WRONG),
        ("lost", 1, LATE),
        ("dead", 1, "micro-batch 0, stage 0, did not come: pipeline rank 0 .* silent for 1 s"),
        ("never lets go", 0, FULL),
    ],
)
def test_a_planted_fault_is_found(run_ranks, fault, rank, words):
    error, wrong, seconds = run_ranks(2, faulty, fault)[rank]
    assert error is not None and re.search(words, error), (error, wrong)
    assert seconds < SECONDS + 5


def disagree():
    slots = pool(2)
    try:
        transport(slots, PLAN, tokens=3 + slots.rank)
    except ValueError as error:
        return str(error)


def test_ranks_that_disagree_about_a_step_are_told_so_in_time(run_ranks):
    for error in run_ranks(2, disagree):
        assert "every stage needs the same micro-batches, sequence length" in error


def after_a_failure():
    slots = pool(2)
    step = transport(slots, PLAN)
    step.abandon()
    with pytest.raises(PipelineError, match="an earlier step failed.*start the job again"):
        transport(slots, PLAN)
    with pytest.raises(PipelineError, match="an earlier step failed"):
        step.send(None, None)


def test_no_step_follows_one_that_failed(run_ranks):
    run_ranks(2, after_a_failure)


def out_of_order():
    slots = pool(2)
    step = transport(slots, PLAN)
    message = next(iter(step.tracks.values())).messages[1]
    with pytest.raises(RuntimeError, match="left of .*microbatch=1.* where the program has that of .*=0"):
        step.send(message, torch.zeros(3, 1, 20))


def test_a_message_out_of_turn_is_noticed(run_ranks):
    run_ranks(2, out_of_order)


def test_counts_wrap_around():
    from megatron_mhc.pipeline.memory import WRAP, reached

    assert reached(5, 5) and reached(6, 5) and not reached(4, 5)
    assert reached(1, WRAP - 1) and not reached(WRAP - 1, 1)


def wrapped():
    """A pool whose counts are about to wrap around."""
    slots = pool(2)
    transport(slots, PLAN)
    near = 2**31 - 3  # where a signed count turns negative
    for lane in slots.places.index:
        slots.counts[lane] = near
        for rank in range(2):
            SharedMemory.put(slots.memory, rank, slots.places.freed(lane), near)
            SharedMemory.put(slots.memory, rank, slots.places.arrived(lane), near)
    torch.distributed.barrier()
    return [int(drive(PLAN, slots.rank, transport(slots, PLAN), step)) for step in range(3)]


def test_messages_come_while_counts_wrap_around(run_ranks):
    assert run_ranks(2, wrapped) == [[0] * 3] * 2
