"""What a machine has operations share: a link's turns, a GPU, and the host that launches them."""

import dataclasses

import pytest

from megatron_mhc.pipeline.costs import (
    APART,
    AWAIT,
    BOTH,
    COPY,
    FAIR,
    IN,
    KERNEL,
    OUT,
    REPORT,
    STREAM,
    Costs,
    Machine,
    Phase,
)
from megatron_mhc.pipeline.events import Node, run
from megatron_mhc.pipeline.simulate import simulate
from megatron_mhc.schedule.program import (
    BACKWARD,
    FORWARD,
    POST,
    SEND,
    SPLIT,
    WAIT,
    Op,
    Plan,
    build_program,
)

PLAN, RANK = Plan(4, 2, 8), 1


class Rank(Costs):
    """Phases by what is computed, one duration for all messages, and one for the host's other operations."""

    def __init__(self, phases, message=0.0, **machine):
        self.of, self.message, self.machine = phases, message, Machine(**machine)

    def phases(self, plan, op):
        return self.of[op.kind] if op.kind in self.of else self.of[op.kind, op.what]

    def transfer(self, message):
        return self.message, self.machine.slices(self.message)


def alone(costs, program=None, plan=PLAN):
    return simulate(plan, costs, [program or build_program(plan, RANK)], alone=True)


def once(*parts):
    """A program of rank 1's first chunk, from kinds and micro-batches."""
    what = {FORWARD: "all", BACKWARD: "all"}
    return [Op(kind, what.get(kind, "streams"), mb, 0 if kind in (POST, WAIT) else 1) for kind, mb in parts]


def both(phases, **how):
    return Rank({FORWARD: phases, BACKWARD: phases}, **how)


# Turns


def asking(turns, large=3, ms=8.0, small=1.0, **how):
    """When a small copy ends that asks while the first of several large ones is under way."""
    machine = Machine(turns=turns)
    nodes, before = [], None
    for at in range(large):
        node = Node(ms / 32, uses=(("in", 0),), slices=32, turn=machine.turn(at, "large"))
        nodes.append(node.after(before))
        before = node
    later = Node(0.5)
    wanted = Node(small / 4, uses=(("in", 0),), slices=4, turn=machine.turn("small", "other")).after(later)
    run([*nodes, later, wanted], **how)
    assert nodes[-1].end == pytest.approx(large * ms + small * (wanted.end < nodes[-1].end))
    return wanted.end


def test_a_links_turns():
    assert asking(FAIR) == pytest.approx(0.5 + 2 * 1.0, abs=0.3)  # half of the link
    assert asking(COPY) == pytest.approx(8 + 1)  # when the copy under way is done
    assert asking(STREAM) == pytest.approx(3 * 8 + 1)  # when all of its stream's are
    assert asking(STREAM, large=1) == asking(COPY, large=1)


def test_both_ways_at_once_take_longer():
    out, back = (Node(0.25, uses=((way, 0),), slices=32) for way in (OUT, IN))
    assert run([out, back]) == pytest.approx(8)
    out, back = (Node(0.25, uses=((way, 0),), slices=32) for way in (OUT, IN))
    assert run([out, back], both_ways=1.5) == pytest.approx(12, rel=0.05)
    one = Node(0.25, uses=((OUT, 0),), slices=32)
    other = Node(0.25, uses=((IN, 1),), slices=32)
    assert run([one, other], both_ways=1.5) == pytest.approx(8)  # two ranks' links


# Links


def test_phases_of_an_operation_follow_one_another():
    phases = [
        Phase(KERNEL, 2),
        Phase(OUT, 1),
        Phase(IN, 1),
        Phase(APART, 3),
        Phase(BOTH, 1),
        Phase(KERNEL, 1),
    ]
    timeline = alone(both(phases), once((FORWARD, 0), (FORWARD, 1))).timeline[0]
    assert [(start, end) for _, start, end in timeline] == [(0, 9), (9, 18)]


@pytest.mark.parametrize("turns, end", [(FAIR, 1 + 2 + 1), (COPY, 8 + 1 + 1), (STREAM, 16 + 1 + 1)])
def test_an_all_to_all_waits_for_messages(turns, end):
    """Two receives of 8 ms are posted; the exchange is back after its turn and a kernel."""
    phases = [Phase(KERNEL, 1), Phase(IN, 1), Phase(KERNEL, 1)]
    program = once((POST, 1), (POST, 2), (FORWARD, 0))
    costs = both(phases, message=8, turns=turns, one_channel=True)
    assert alone(costs, program).timeline[0][-1][2] == pytest.approx(end, abs=0.3)
    away = both([Phase(KERNEL, 1), Phase(OUT, 1), Phase(KERNEL, 1)], message=8, turns=turns, one_channel=True)
    assert alone(away, program).timeline[0][-1][2] == 3  # the other direction
    two = both([Phase(KERNEL, 1), Phase(BOTH, 1), Phase(KERNEL, 1)], message=8, turns=turns, one_channel=True)
    assert alone(two, program).timeline[0][-1][2] == pytest.approx(end, abs=0.3)


def test_messages_pass_in_the_order_that_they_are_posted():
    """With a channel of its own a gradient, posted last, need not wait for all of the streams."""
    down = [Op(POST, "d_streams", 0, 2), Op(WAIT, "d_streams", 0, 2)]
    program = [*once((POST, 0), (POST, 1), (POST, 2)), *down, *once((FORWARD, 0))]
    for one, end in ((True, 32), (False, 16)):
        costs = both([Phase(KERNEL, 1)], message=8, one_channel=one, turns=COPY)
        timeline = alone(costs, program).timeline[0]
        assert [at for op, _, at in timeline if op.kind == WAIT] == [end]


# The host


def test_operations_begin_when_the_host_has_come_to_them():
    program = once((FORWARD, 0), (FORWARD, 1), (FORWARD, 2))
    slow = both([Phase(KERNEL, 2, host=5)])
    assert [s for _, s, _ in alone(slow, program).timeline[0]] == [0, 2, 4]  # no host
    slow.machine = Machine(host=True)
    assert [s for _, s, _ in alone(slow, program).timeline[0]] == [0, 5, 10]
    fast = both([Phase(KERNEL, 5, host=1)], host=True)
    assert [s for _, s, _ in alone(fast, program).timeline[0]] == [0, 5, 10]


def test_a_host_that_waits_posts_late():
    """The receive behind a forward is posted when the host has been told the number of tokens."""
    report = [Phase(KERNEL, 4, 1), Phase(REPORT), Phase(KERNEL, 3, 1), Phase(AWAIT), Phase(KERNEL, 3, 1)]
    program = once((FORWARD, 0), (POST, 1), (WAIT, 1), (FORWARD, 1))
    for phases, late, posted in ((report, False, 5), (report, True, 10), (report[:1], False, 1)):
        costs = both(phases, message=6, host=True, late=late)
        timeline = alone(costs, program).timeline[0]
        assert [end for op, _, end in timeline if op.kind == POST] == [posted]
        waited = next(end for op, _, end in timeline if op.kind == WAIT)
        assert waited == max(timeline[0][2], posted + 6)


def test_a_report_waits_behind_what_is_sent():
    """Tokens per expert go to the host over the link of the messages."""
    told = [Phase(KERNEL, 1), Phase(REPORT, 0.01), Phase(AWAIT), Phase(KERNEL, 1)]
    program = once((FORWARD, 0), (SEND, 0), (FORWARD, 1))
    step = {
        turns: alone(both(told, message=8, host=True, turns=turns), program).step for turns in (FAIR, COPY)
    }
    assert step[COPY] == pytest.approx(2 + 8 + 0.02 + 1, abs=0.02)
    assert step[FAIR] == pytest.approx(2 + 8, abs=0.5)
    untold = [Phase(KERNEL, 1), Phase(REPORT, 0.0), Phase(AWAIT), Phase(KERNEL, 1)]
    assert alone(both(untold, message=8, host=True, turns=COPY), program).timeline[0][-1][2] == 4


def test_the_host_is_ahead_only_so_far():
    program = once(*[(FORWARD, at) for at in range(4)], (POST, 9))
    for ahead, posted in ((None, 0), (1, 20), (3, 0)):
        costs = both([Phase(KERNEL, 10)], host=True, ahead=ahead)
        assert alone(costs, program).timeline[0][-1][2] == posted


def test_a_program_of_a_rank_with_a_fast_host_is_the_one_without():
    """Where nothing is waited for, the host changes no step."""
    for fused in (False, True):
        plan = dataclasses.replace(PLAN, fused=fused, boundary=SPLIT)
        phases = [Phase(KERNEL, 2, 0.1)]
        steps = {alone(both(phases, host=at), plan=plan).step for at in (False, True)}
        assert len(steps) == 1


# The GPU


def test_kernels_of_two_streams_share_the_gpu():
    """Side by side they take no less than one after the other; all-to-alls hide all the same."""
    plan = Plan(4, 2, 8, fused=True)
    times = {"attention": 4, "experts": 4, "post": 2, "dispatch": 0, "combine": 0}
    nodes = {
        (kind, what): [Phase(APART if what in ("dispatch", "combine") else KERNEL, ms or 1.0)]
        for kind in (FORWARD, BACKWARD)
        for what, ms in times.items()
    }
    work = 2 * plan.chunks * (4 + 4 + 2)
    runs = [alone(Rank(nodes, kernels=at, slice=0.1), plan=plan) for at in (False, True)]
    assert runs[0].step < work <= runs[1].step < work + 2 * plan.chunks * 2
    for op, start, end in runs[1].timeline[0]:
        if op.what == "post" and op.kind in (FORWARD, BACKWARD):
            assert end - start < 2 + 0.2  # ahead of the other stream's kernels


@pytest.mark.parametrize("last, end", [(IN, 20), (OUT, 4)])
def test_a_stream_whose_last_work_was_a_copy_waits_at_that_engine(last, end):
    """Two receives of 8 ms are posted at 2; the second forward's kernel is launched at 3, behind a copy."""
    program = once((FORWARD, 0), (POST, 1), (POST, 2), (FORWARD, 1))
    phases = [Phase(KERNEL, 1, host=1), Phase(last, 1, host=1)]
    costs = both(phases, message=8, turns=STREAM, one_channel=True, host=True)
    assert alone(costs, program).timeline[0][-1][2] == pytest.approx(end)
    freely = both(phases, message=8, turns=COPY, one_channel=True, host=True)
    assert alone(freely, program).timeline[0][-1][2] == pytest.approx(11 if last == IN else 4)
