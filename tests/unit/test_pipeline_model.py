"""From what one rank's steps noted to the simulator's costs, with notes that are made up."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
import pipeline_model  # noqa: E402
import standins  # noqa: E402
import timeline  # noqa: E402

from megatron_mhc.pipeline.costs import AWAIT, COPY, FAIR, IN, KERNEL, OUT, REPORT, STREAM, Phase  # noqa: E402
from megatron_mhc.schedule.program import FORWARD, POST, Message, Op, Plan  # noqa: E402

FORWARDS = [Op(FORWARD, "all", at, 1) for at in range(2)]
POSTED = Op(POST, "streams", 1, 0)


def mark(at):
    made = timeline.Mark()
    made.at = at / 1e3
    return made


def noted(alone, slow=1.0):
    """A step of two forwards, a post between them; times in ms, those of the device where not `alone`."""
    log, now = timeline.Log(alone), 0.0
    log.origin = mark(0)
    for op in (FORWARDS[0], POSTED, FORWARDS[1], POSTED):
        log.came.append(now / 1e3)
        now += 100.0 * alone  # until the device is done
        log.op = op
        log.begun.append((op, mark(now)))
        if op.kind == FORWARD:
            log.part(REPORT, mark(now + 1 * slow))
            log.part(OUT, mark(now + 2 * slow), mark(now + 4 * slow))
            log.part(IN, log.parts[-1].end, mark(now + 7 * slow))
            log.part(AWAIT, mark(now + 8 * slow), mark(now + 50 * slow))
            now += 54 * slow
        else:
            now += 0.5 * slow
    return log


def test_phases_of_operations():
    """The device's from one step and the host's from another, whose waiting for the device is left out."""
    found = timeline.phases([noted(False), noted(True, slow=0.1)], pipeline_model.kind)
    kinds = [KERNEL, REPORT, KERNEL, OUT, IN, KERNEL, AWAIT, KERNEL]
    assert list(found) == ["forward all"] and [kind for kind, *_ in found["forward all"]] == kinds
    device = [ms for _, ms, _ in found["forward all"]]
    assert device == pytest.approx([1, 0, 1, 2, 3, 1, 0, 4])
    assert [host for *_, host in found["forward all"]] == pytest.approx([ms / 10 for ms in device])
    assert timeline.host_times([noted(True)]) == {POST: pytest.approx(0.5)}


def test_the_hosts_lead():
    log = noted(False)
    assert timeline.lead([log]) == 0  # on a CPU nothing is ahead
    log.begun[1:] = [(op, mark(1e3 * m.at + 200)) for op, m in log.begun[1:]]
    (second, begun), log.begun[2] = log.begun[2], (FORWARDS[1], mark(60))
    assert second == FORWARDS[1] and begun.at > 0.06
    assert timeline.lead([log]) == 1  # the first has not ended when the host begins the second


def test_all_that_a_step_noted_can_be_written():
    log = noted(False)
    log.copies, log.ways = [("streams", mark(1), mark(8))], [IN]
    found = json.loads(json.dumps(timeline.raw(log)))
    assert found["operations: op, host came, host, device"][2][:5] == list(FORWARDS[1])
    assert found["parts: operation, kind, start, end, host start, host end"][4][0] == 2  # the third operation
    assert found["copies: message, way, start, end"] == [["streams", IN, 1.0, 8.0]]


@pytest.mark.parametrize("waited, rule", [(2.1, FAIR), (6.9, COPY), (19.5, STREAM)])
def test_the_rule_of_a_link_is_found(waited, rule):
    asked = [{"high": 0, "waited": waited, FAIR: 1.8, COPY: 7.4, STREAM: 21.0}]
    asked.append({"high": 1, "waited": 1.8, FAIR: 1.8, COPY: 7.4, STREAM: 21.0})
    assert standins.turns(asked, 0) == rule and standins.turns(asked, 1) == FAIR


WIDE, NARROW = {OUT: 6.0, IN: 7.0}, {OUT: 1.0, IN: 1.5}
LINK = {
    "alone": {"streams": WIDE, "d_streams": WIDE, "mixed": WIDE, "write": NARROW, "d_write": NARROW},
    "report": 0.01,
    "report behind a message": 5.0,
    "both ways": 1.0,
    "turns": {"normal": STREAM, "high": COPY},
}
FORWARD_PHASES = [[KERNEL, 4.0, 1.0], [REPORT, 0.0, 0.0], [OUT, 1.0, 0.1], [IN, 1.0, 0.1]]
PHASES = {
    "forward all": [*FORWARD_PHASES, [AWAIT, 0.0, 0.0], [KERNEL, 7.0, 1.0]],
    "backward all": [[OUT, 1.0, 0.1], [IN, 1.0, 0.1], [KERNEL, 18.0, 2.0]],
}
INPUTS = {"phases": PHASES, "host": {POST: 0.05}, "lead": 3}
ARGUMENTS = {"pp": 4, "rank": 1, "vpp": 2, "microbatches": 8, "layers": 1, "replay": "off"}


def rank(order="interleaved", **how):
    plan = pipeline_model.plan_of(ARGUMENTS, order, "whole")
    return plan, pipeline_model.Rank(LINK, INPUTS, plan, order, 1, **how)


def test_costs_of_a_measured_rank():
    plan, costs = rank()
    assert isinstance(plan, Plan) and plan.stages == 8
    assert costs.transfer(Message("streams", 0, 0))[0] == 7.0  # comes
    assert costs.transfer(Message("streams", 0, 1))[0] == 6.0  # goes
    assert costs.phases(plan, FORWARDS[0])[1] == Phase(REPORT, 0.01, 0.0)
    assert costs.host(POSTED) == 0.05
    machine = costs.machine
    assert machine.host and machine.turns == STREAM and not machine.late and not machine.kernels
    assert machine.ahead is None  # the host waits in each forward
    assert rank("megatron")[1].machine.late
    fused = rank("fused")[1].machine
    assert fused.kernels and fused.turns == COPY
    alone = rank(shared=False)[1].phases(plan, FORWARDS[0])
    assert not {OUT, IN} & {phase.kind for phase in alone} and sum(p.ms for p in alone) == 13.0


def test_what_a_rank_waits_for():
    """A link of their own costs all-to-alls nothing; without messages nothing is exposed."""
    report = {"arguments": ARGUMENTS, "link": LINK}
    found = pipeline_model.simulated(report, "interleaved whole", INPUTS)
    compute = 16 * (13 + 20)
    assert found["without both"] == pytest.approx(compute - 16 * 4, abs=0.5)  # and the reports
    assert found["without messages"] == pytest.approx(compute, abs=0.5)
    assert found["links apart"] < compute + 30 < found["simulated"]
    assert found["neither"] < compute + 30


def test_simulated_again_from_a_file(tmp_path, capsys):
    run = {"step": 700.0, "without messages": 530.0, "without both": 460.0, "inputs": INPUTS}
    report = {"arguments": ARGUMENTS, "link": LINK, "runs": {"interleaved whole": run, "fused whole": {}}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(report))
    pipeline_model.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    found = pipeline_model.simulated(report, "interleaved whole", INPUTS)
    assert len(lines) == 3
    assert f"{found['simulated']:.1f}   {found['simulated'] / 700:.2f}" in lines[2]
    assert f"530.0    {found['without messages']:.1f}" in lines[2]


def test_messages_of_one_size_count_as_one():
    """Of the pairs each has the median; the factor of both ways keeps what two messages at once took."""
    alone = {"streams": {OUT: 6.0, IN: 6.0}, "mixed": {OUT: 7.0, IN: 6.0}, "d_streams": {OUT: 8.0, IN: 9.0}}
    found = pipeline_model.settled(LINK | {"alone": alone | dict.fromkeys(("write", "d_write"), NARROW)})
    assert all(found["alone"][name] == {OUT: 7.0, IN: 6.0} for name in alone)
    assert found["alone"]["write"] == NARROW
    assert found["both ways"] == pytest.approx(12 / 13)


def test_a_host_is_as_fast_as_it_was_seen_without_hurry():
    phases = timeline.phases([noted(False), noted(True, slow=0.1)], pipeline_model.kind)
    inputs = {"phases": phases, "host": {}, "lead": 0}
    known = [host for *_, host in phases["forward all"]]
    slower = pipeline_model.unhurried(inputs, [timeline.raw(noted(False, slow=0.5))])
    assert [host for *_, host in slower["phases"]["forward all"]] == pytest.approx(known)
    faster = pipeline_model.unhurried(inputs, [timeline.raw(noted(False, slow=0.05))])
    found = faster["phases"]["forward all"]
    assert [tuple(row[:2]) for row in found] == [row[:2] for row in phases["forward all"]]
    halved = [0.0 if kind in (REPORT, AWAIT) else host / 2 for kind, _, host in phases["forward all"]]
    assert [host for *_, host in found] == pytest.approx(halved)


def test_steps_simulated_with_the_times_that_one_of_them_noted():
    """What messages took in it, and for itself also its host, decides, and not what they took apart."""
    report = {"arguments": ARGUMENTS, "link": LINK}
    phases = PHASES | {"backward all": [[KERNEL, 0.0, 0.0], *PHASES["backward all"]]}  # all begin with one
    plan = pipeline_model.plan_of(ARGUMENTS, "interleaved", "whole")
    program = pipeline_model.program_of(plan, "interleaved", 1)

    def noted_step(message, host):
        rows, parts, copies, now = [], [], [], 0.0
        for number, op in enumerate(program):
            rows.append([*op, now, now, now])
            if op.kind in ("forward", "backward"):
                for kind, *_ in phases[f"{op.kind} all"]:
                    if kind != KERNEL:
                        parts.append([number, kind, now, now, now, now])
                now += host
            elif op.kind in (POST, "send"):
                copies.append([op.what, IN if op.kind == POST else OUT, 0.0, message])
        return {"operations": rows, "parts": parts, "quiet": [], "copies": copies}

    def simulated(**how):
        known = report, "interleaved whole", INPUTS | {"phases": phases}, [600.0, 900.0, 700.0, 500.0]
        found = pipeline_model.from_one_step(*known, noted_step(**how))
        assert [measured for measured, _ in found.values()] == [700.0, 500.0]
        return [model for _, model in found.values()]

    compute = 16 * (13 + 20)
    assert simulated(message=0.01, host=0.01) == pytest.approx([compute, compute], rel=0.01)
    assert min(simulated(message=40.0, host=0.01)) > compute + 16 * 10
    assert simulated(message=0.01, host=60.0) == pytest.approx([compute, 16 * 2 * 60], rel=0.05)
