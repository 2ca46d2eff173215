"""The simulator: closed forms, what hides and what does not, and the command line."""

import dataclasses

import pytest

from megatron_mhc.pipeline.check import Deadlock, check_programs
from megatron_mhc.pipeline.megatron_order import megatron_programs
from megatron_mhc.pipeline.program import FORWARD, SEND, SPLIT, WHOLE, Message, Plan, build_program
from megatron_mhc.pipeline.simulate import Times, main, measure, schedules, simulate

# F = 2, B = 4, and no communication
FLAT = Times(
    attention=1,
    mlp=1,
    post=0,
    attention_backward=2,
    mlp_backward=2,
    replay=0,
    all_to_all=0,
    stream=0,
    latency=0,
    streams=4,
)


@pytest.mark.parametrize("pp, vpp, microbatches", [(2, 1, 4), (2, 2, 4), (4, 2, 8), (4, 3, 16), (8, 2, 16)])
@pytest.mark.parametrize("order", ["megatron", "unfused"])
def test_without_communication_the_bubble_is_the_known_one(pp, vpp, microbatches, order):
    """(pp - 1) chunks' forward and backward, and the rest of the step is compute."""
    plan = Plan(pp, vpp, microbatches)
    result = measure(plan, FLAT, megatron_programs if order == "megatron" else None)
    assert result.ideal == microbatches * vpp * 6
    assert result.bubble == pytest.approx((pp - 1) * 6)
    assert result.all_to_all == result.p2p == 0


def exposed(plan, stream, microbatches=64):
    """Exposed milliseconds of transfer for each chunk of a long step."""
    plan = dataclasses.replace(plan, microbatches=microbatches)
    return measure(plan, dataclasses.replace(FLAT, stream=stream)).p2p / (microbatches * plan.vpp)


def test_what_a_hop_can_hide():
    """Unfused a hop hides behind F = 2, also where both directions share a link; fused it has no slack."""
    plan = Plan(4, 2, 8)
    assert exposed(plan, 0.2) < 0.1  # 4 streams: 0.8 ms a hop, 1.6 where it shares the link
    assert exposed(plan, 1.2) > 1
    assert exposed(dataclasses.replace(plan, boundary=SPLIT), 0.4) < exposed(plan, 0.4) / 2
    fused = dataclasses.replace(plan, fused=True)
    assert exposed(fused, 0.4) > 0.3  # no slack but the other microbatch's attention backward
    assert exposed(dataclasses.replace(fused, boundary=SPLIT), 0.4) < 0.1


def test_the_papers_27b():
    """The order that the design rests on: split beats whole, fused beats unfused, both beat Megatron."""
    steps = {
        name: r.step
        for name, r in schedules(Plan(8, 4, 32, layers=1, replay=True), Times(stream=0.466)).items()
    }
    assert (
        steps["fused, split"]
        < steps["interleaved, split"]
        < steps["interleaved, whole"]
        < steps["fused, whole"]
        < steps["Megatron's order"]
    )
    plan = Plan(8, 2, 32, fused=True, layers=2)
    results = [measure(plan, Times(), priority=priority) for priority in (True, False)]
    assert results[1].all_to_all > results[0].all_to_all + 20  # the post_res in the way of the combine


def test_transfers_share_a_link():
    """Two messages that leave one rank together take twice as long as one."""
    plan = Plan(2, 1, 1, boundary=SPLIT, forward_only=True)
    times = dataclasses.replace(FLAT, mlp=0.0, stream=1.0)
    # stage 0's attention (1), then u (4 streams) and [f, h_post] (1), then stage 1's attention (1)
    assert simulate(plan, times).step == pytest.approx(1 + 4 + 1 + 1)


def test_peak_of_chunks_and_time_line():
    plan = Plan(4, 2, 8)
    run = simulate(plan, FLAT)
    assert measure(plan, FLAT).in_flight == plan.in_flight(0)
    for rank, timeline in enumerate(run.timeline):
        assert [op for op, _, _ in timeline] == build_program(plan, rank)
        busy = sorted((start, end) for op, start, end in timeline if end > start)
        assert all(a[1] <= b[0] for a, b in zip(busy, busy[1:], strict=False))  # one stream, one at a time
    sends = {op.message: end for timeline in run.timeline for op, _, end in timeline if op.kind == SEND}
    for timeline in run.timeline:
        for op, start, _ in timeline:
            if op.kind == FORWARD and op.stage:
                assert start >= sends[Message("streams", op.microbatch, op.stage - 1)]


def test_megatrons_order_is_sound():
    for pp, vpp, m in ((2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 4, 32)):
        plan = Plan(pp, vpp, m, boundary=WHOLE)
        simulate(plan, Times(), megatron_programs(plan))
    with pytest.raises(ValueError, match="unfused training with whole messages"):
        megatron_programs(dataclasses.replace(plan, fused=True))


def test_a_deadlock_is_reported():
    plan = Plan(2, 1, 2)
    broken = [build_program(plan, rank) for rank in range(2)]
    broken[0] = [op for op in broken[0] if op.kind != SEND]
    with pytest.raises(Deadlock, match="rank 1 at"):
        simulate(plan, FLAT, broken)
    with pytest.raises(ValueError):
        check_programs(plan, broken)


def test_command_line(tmp_path, capsys):
    picture = tmp_path / "schedule.png"
    main(["--pp", "4", "--vpp", "2", "--microbatches", "8", "--attention", "2.5", "--png", str(picture)])
    table = capsys.readouterr().out
    for name in (
        "Megatron's order",
        "interleaved, whole",
        "interleaved, split",
        "fused, whole",
        "fused, split",
    ):
        assert name in table
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="--draw 'mine': choose one of"):
        main(["--pp", "2", "--vpp", "1", "--microbatches", "2", "--png", str(picture), "--draw", "mine"])
