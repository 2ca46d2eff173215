"""The programs of all ranks fit together: order, channels, deadlock, chunks in flight."""

import dataclasses
import functools
import itertools
import subprocess
import sys

import pytest
from megatron.core.pipeline_parallel import schedules

from megatron_mhc.schedule import program as p
from megatron_mhc.schedule.check import Deadlock, check_programs, chunk_events, held_up, peak_in_flight
from megatron_mhc.schedule.program import Op, Plan, build_program


def programs(plan):
    return [build_program(plan, rank) for rank in range(plan.pp)]


def compute(ops, kind):
    """(microbatch, stage) in the order that chunks start (forward) or end (backward)."""
    return [(mb, stage) for what, mb, stage in chunk_events(ops) if what == kind]


MODES = [
    pytest.param(dict(boundary=boundary) | mode, id=f"{boundary}-{name}")
    for boundary in (p.WHOLE, p.SPLIT)
    for name, mode in {
        "unfused": {},
        "replay": dict(replay=True),
        "fused": dict(fused=True, layers=2, replay=True),
        "evaluation": dict(forward_only=True),
    }.items()
]


@pytest.mark.parametrize("mode", MODES)
def test_no_settings_deadlock(mode):
    """Hundreds of them: channels' ends agree, no rank waits for ever, chunks in flight are bounded."""
    for pp in (2, 3, 4, 5):
        for vpp in (1, 2, 3):
            for microbatches in sorted({1, 2, pp - 1, pp, pp + 1, 2 * pp - 1, 3 * pp + 2, 4 * pp}):
                check_programs(Plan(pp, vpp, microbatches, **mode))
            for group in (pp + 1, 2 * pp):
                check_programs(Plan(pp, vpp, 3 * pp + 1, group=group, **mode))
    check_programs(Plan(8, 4, 32, **mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_no_settings_deadlock_at_all(mode):
    for pp in range(2, 9):
        for vpp in range(1, 6):
            for microbatches in range(1, 4 * pp + 3):
                for group in (None, pp + 1, pp + 3):
                    check_programs(Plan(pp, vpp, microbatches, group=group, **mode))


@pytest.mark.parametrize("mode", MODES)
def test_every_chunk_runs_once_and_in_order(mode):
    plan = Plan(3, 2, 7, **mode)
    for rank, ops in enumerate(programs(plan)):
        everything = {(mb, chunk * 3 + rank) for mb in range(7) for chunk in range(2)}
        forward = compute(ops, p.FORWARD)
        assert len(forward) == 14 and set(forward) == everything
        for stage in (rank, 3 + rank):  # a data iterator gives microbatches in order
            assert [mb for mb, s in forward if s == stage] == list(range(7))
        if not plan.forward_only:
            backward = compute(ops, p.BACKWARD)
            assert len(backward) == 14 and set(backward) == everything
        assert len(ops) == len(set(ops))


PLAIN = [
    (pp, vpp, microbatches, group)
    for pp in (2, 3, 4, 8)
    for vpp in (2, 3, 4)
    for microbatches in (pp, 2 * pp, 3 * pp, 4 * pp)
    for group in {pp, min(2 * pp, microbatches), min(pp + 1, microbatches)}
    if microbatches % group == 0 or microbatches % group >= pp
]


@pytest.mark.parametrize("fused", [False, True])
def test_order_is_megatrons(monkeypatch, fused):
    """For all that Megatron accepts: its table, its warm-up and so its whole order of chunks."""
    for pp, vpp, microbatches, group in PLAIN:
        plan = Plan(pp, vpp, microbatches, group=group, fused=fused)
        table = schedules.get_schedule_table(microbatches, vpp, group)
        assert plan.forward_order() == table
        for rank in range(pp):
            for name, value in {
                "get_pipeline_model_parallel_world_size": pp,
                "get_pipeline_model_parallel_rank": rank,
                "get_virtual_pipeline_model_parallel_world_size": vpp,
            }.items():
                monkeypatch.setattr(schedules.parallel_state, name, functools.partial(int, value))
            total, _, warm, rest = schedules.get_pp_rank_microbatches(
                microbatches, vpp, group, overlap_moe_expert_parallel_comm=fused
            )
            assert plan.warmup(rank) == warm
            expected = [(p.FORWARD, i) for i in range(warm)]
            for j in range(rest):
                expected += [(p.FORWARD, warm + j), (p.BACKWARD, j)]
            expected += [(p.BACKWARD, j) for j in range(rest, total)]
            back = plan.backward_order()
            assert list(chunk_events(build_program(plan, rank))) == [
                (kind, mb, chunk * pp + rank)
                for kind, at in expected
                for mb, chunk in [(table if kind == p.FORWARD else back)[at]]
            ]


def test_remainder_that_megatron_refuses_joins_the_last_group():
    assert Plan(4, 2, 9).groups() == [4, 5]
    assert Plan(4, 2, 3).groups() == [3]
    assert Plan(4, 2, 13, group=6).groups() == [6, 7]
    assert Plan(4, 2, 10, group=6).groups() == [6, 4]


@pytest.mark.parametrize("mode", MODES)
def test_receives_are_posted_at_least_one_compute_step_ahead(mode):
    for plan in (Plan(4, 2, 8, **mode), Plan(2, 3, 5, ahead=1, **mode), Plan(3, 1, 4, **mode)):
        waits = 0
        for ops in programs(plan):
            computed, posted_at = 0, {}
            started: set = set()
            for op in ops:
                if op.kind in (p.FORWARD, p.BACKWARD):
                    started.add((op.kind, op.microbatch, op.stage))
                    computed = len(started)
                elif op.kind == p.POST:
                    posted_at[op.message] = computed
                elif op.kind == p.WAIT and computed:  # nothing can be ahead of a rank's first chunk
                    waits += 1
                    assert posted_at[op.message] < computed
        assert waits


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_stands_still_holds_up_no_message_of_its_own(mode):
    """Hosts wait for pending messages where a kernel is launched first; see loading.py."""
    for pp, vpp in itertools.product((2, 3, 4), (1, 2, 3)):
        for microbatches in (2 * pp - 1, 2 * pp + 1, 4 * pp):
            assert not next(held_up(Plan(pp, vpp, microbatches, **mode)), None)


def test_a_rank_that_stands_still_holds_up_what_was_posted_too_early_or_is_posted_too_late():
    early = Plan(2, 2, 8, fused=True, ahead=2)
    assert {op.kind for *_, pending in held_up(early) for op in pending} == {p.POST}
    late = Plan(2, 2, 8, group=4)
    assert p.SEND in {op.kind for *_, pending in held_up(late) for op in pending}
    # A step that warms up by all of its forwards: the first gradient, posted in front of the last forward.
    few = list(held_up(Plan(4, 1, 4, fused=True)))
    assert {(op.kind, op.what) for *_, pending in few for op in pending} == {(p.POST, "d_streams")}
    assert {compute.kind for _, compute, _ in few} == {p.FORWARD}


@pytest.mark.parametrize("fused", [False, True])
def test_split_boundary_sends_early_and_waits_late(fused):
    plan = Plan(4, 2, 8, boundary=p.SPLIT, fused=fused, layers=2, replay=True)
    last_node = {False: (p.HEAD, p.TAIL), True: ("attention", "experts")}[fused]
    for ops in programs(plan):
        at = {op: i for i, op in enumerate(ops)}
        layer = plan.layers_of(0) - 1 if fused else -1
        for op in ops:
            mb, stage = op.microbatch, op.stage
            if op.kind == p.SEND and op.what == "mixed":
                before, mlp = (Op(p.FORWARD, part, mb, stage, layer) for part in last_node)
                write = Op(p.SEND, "write", mb, stage)
                assert at[before] < at[op] < at[mlp] < at[write]  # u leaves before the last MLP, f after it
            if op.kind == p.WAIT and op.what == "d_write":
                own = stage - 1
                rest, mlp = (Op(p.BACKWARD, part, mb, own, layer) for part in last_node)
                streams = Op(p.WAIT, "d_streams", mb, stage)
                replay = Op(p.REPLAY, p.ALL, mb, own)
                assert at[replay] < at[op] < at[mlp] < at[streams] < at[rest]
            if op.kind == p.SEND and op.what == "d_write":
                assert ops[at[op] + 1] == Op(p.SEND, "d_streams", mb, stage)  # df before dx


@pytest.mark.parametrize("mode", MODES)
def test_chunks_in_flight(mode):
    plan = Plan(4, 2, 16, **mode)
    peaks = [peak_in_flight(ops) for ops in programs(plan)]
    if plan.forward_only:
        assert peaks == [1] * 4
    else:  # 2 hops each, one group, and the one that runs
        assert peaks == [2 * (3 - rank) + 4 + 1 + plan.fused for rank in range(4)]


def test_a_fused_step_never_needs_its_own_forward():
    plan = Plan(4, 2, 8, fused=True)
    for rank in range(4):
        forward, backward = plan.forward_order(), plan.backward_order()
        for step in plan.steps(rank):
            if step.forward is not None and step.backward is not None:
                assert forward[step.forward] != backward[step.backward]


def test_all_to_alls_of_a_fused_step_stand_beside_compute_of_the_other_microbatch():
    plan = Plan(2, 1, 6, fused=True)
    steady = plan.steps(0)[plan.warmup(0)]
    up, down = steady.forward, steady.backward
    nodes = [op for op in build_program(plan, 0) if op.layer >= 0 and op.microbatch in (up, down)]
    start = nodes.index(Op(p.BACKWARD, "post", down, 0, 0))
    assert [(op.kind, op.what) for op in nodes[start : start + 10]] == [
        (p.BACKWARD, "post"),
        (p.BACKWARD, "combine"),  # an all-to-all, beside
        (p.FORWARD, "attention"),
        (p.FORWARD, "dispatch"),  # beside
        (p.BACKWARD, "experts"),
        (p.BACKWARD, "dispatch"),  # beside
        (p.FORWARD, "experts"),
        (p.FORWARD, "combine"),  # beside
        (p.FORWARD, "post"),  # on a stream of its own: it waits for the combine, the attention does not
        (p.BACKWARD, "attention"),
    ]


def swap(ops, first, second):
    a, b = ops.index(first), ops.index(second)
    ops[a], ops[b] = ops[b], ops[a]


def test_swapped_messages_are_noticed():
    plan = Plan(2, 2, 4)
    broken = programs(plan)
    sends = [op for op in broken[0] if op.kind == p.SEND and op.what == "streams"]
    swap(broken[0], sends[0], sends[1])
    with pytest.raises(ValueError, match="forward, rank 0 to 1: the ends disagree"):
        check_programs(plan, broken)


def test_a_wait_that_nobody_can_meet_is_a_deadlock():
    plan = Plan(2, 1, 4)
    broken = programs(plan)
    wait = next(op for op in broken[0] if op.kind == p.WAIT and op.what == "d_streams")
    broken[0].remove(wait)
    broken[0].insert(0, wait)  # rank 0 asks for the gradient before it sends what that follows from
    with pytest.raises(Deadlock, match="rank 0 at .*d_streams.*rank 1 at"):
        check_programs(plan, broken)


def test_a_missing_wait_and_too_many_chunks_are_noticed():
    plan = Plan(2, 1, 4)
    broken = programs(plan)
    broken[1].remove(next(op for op in broken[1] if op.kind == p.WAIT))
    with pytest.raises(ValueError, match="rank 1 does not wait once"):
        check_programs(plan, broken)
    eager = dataclasses.replace(plan, forward_only=True)
    hoarding = [
        build_program(eager, rank) + [op for op in build_program(plan, rank) if op.kind == p.BACKWARD]
        for rank in range(2)
    ]
    with pytest.raises(ValueError, match="holds 4 chunks, expected at most"):
        check_programs(plan, hoarding)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(pp=0), "pp=0: give at least 1"),
        (dict(pp=1, vpp=2), "vpp=2 needs at least 2 pipeline ranks"),
        (dict(microbatches=0), "microbatches=0: give at least 1"),
        (dict(ahead=0), "ahead=0: give at least 1"),
        (dict(group=1), "group=1: give at least the 2"),
        (dict(boundary="half"), "boundary='half': choose one of whole, split"),
        (dict(layers=(1, 1)), "give one number, or one per stage, 4"),
    ],
)
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Plan(**(dict(pp=2, vpp=2, microbatches=4) | change))


def test_programs_need_no_torch():
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('program', {p.__file__!r});"
        "module = importlib.util.module_from_spec(spec); sys.modules['program'] = module;"
        "spec.loader.exec_module(module); module.build_program(module.Plan(4, 2, 8), 1);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
