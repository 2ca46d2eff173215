"""Which steps go by way of the hosts, and how much such a step holds."""

import itertools

import pytest
import torch

from megatron_mhc.pipeline import loading
from megatron_mhc.pipeline.comm import most_on_host
from megatron_mhc.schedule.program import POST, SEND, WAIT, Plan, build_program


def test_every_model_has_a_first_step_of_each_kind():
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    asked = [(one, "train"), (one, "train"), (one, "evaluate"), (other, "train"), (one, "evaluate")]
    assert [loading.first_of_its_kind(*what) for what in asked] == [True, False, True, True, False]


def ends(plan, most):
    """Whether all ranks end, each host waiting while more than `most` of its messages have not left."""
    programs = [build_program(plan, rank) for rank in range(plan.pp)]
    at, leaving = [0] * plan.pp, [[] for _ in programs]
    sent, posted = set(), set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                op, mine = program[at[rank]], leaving[rank]
                if op.kind == WAIT and op.message not in sent:
                    break
                if op.kind == POST:
                    posted.add(op.message)
                if op.kind == SEND and op.message not in sent:
                    sent.add(op.message)
                    mine.append(op.message)
                while len(mine) > most and mine[0] in posted:
                    mine.pop(0)
                if len(mine) > most:
                    break
                at[rank] += 1
                moved = True
    return all(i == len(program) for i, program in zip(at, programs, strict=True))


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_hosts_that_hold_no_more_do_not_wait_for_each_other(pp):
    for vpp, count, boundary, fused, group in itertools.product(
        (1, 2, 3), (1, pp, 2 * pp + 1, 4 * pp), ("whole", "split"), (False, True), (None, pp + 2, 3 * pp)
    ):
        if group is None or (vpp > 1 and group <= count):
            plan = Plan(pp, vpp, count, group=group, boundary=boundary, fused=fused, layers=2)
            assert ends(plan, most_on_host(plan)), plan
    for vpp, count in itertools.product((1, 3), (pp, 2 * pp + 1)):
        plan = Plan(pp, vpp, count, boundary="split", forward_only=True)
        assert ends(plan, most_on_host(plan)), plan


def test_too_few_would():
    assert not ends(Plan(8, 2, 20, group=10, boundary="split"), 4)
