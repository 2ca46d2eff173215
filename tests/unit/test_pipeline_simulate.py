"""The simulator: closed forms, what hides and what does not, and the command line."""

import dataclasses

import pytest

from megatron_mhc.pipeline import picture
from megatron_mhc.pipeline.megatron_order import megatron_programs
from megatron_mhc.pipeline.simulate import MEANINGS, Times, main, measure, schedules, simulate
from megatron_mhc.schedule.check import Deadlock, check_programs
from megatron_mhc.schedule.program import FORWARD, SEND, SPLIT, WAIT, WHOLE, Message, Plan, build_program

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
        < steps["fused, whole"]
        < steps["interleaved, whole"]
        < steps["Megatron's order"]
    )
    documented = {"Megatron's order": 1853, "interleaved, whole": 1656, "interleaved, split": 1571}
    documented |= {"fused, whole": 1580, "fused, split": 1441}
    assert {name: round(step) for name, step in steps.items()} == documented  # docs/pipeline.md
    plan = Plan(8, 2, 32, fused=True, layers=2)
    results = [measure(plan, Times(), priority=priority) for priority in (True, False)]
    assert results[1].all_to_all > results[0].all_to_all + 20  # the post_res in the way of the combine


def test_transfers_share_a_link():
    """Two messages that leave one rank together take twice as long as one."""
    plan = Plan(2, 1, 1, boundary=SPLIT, forward_only=True)
    times = dataclasses.replace(FLAT, mlp=0.0, stream=1.0)
    # stage 0's attention (1), then u (4 streams) and [f, h_post] (1), then stage 1's attention (1)
    assert simulate(plan, times).step == pytest.approx(1 + 4 + 1 + 1)


def test_all_to_alls_share_the_link_with_messages():
    plan = Plan(4, 2, 8, layers=2)
    times = dataclasses.replace(Times(), all_to_all=0.6)
    shared = dataclasses.replace(times, shared_link=True)
    for fused, boundary in ((False, WHOLE), (True, SPLIT)):
        plan = dataclasses.replace(plan, fused=fused, boundary=boundary)
        assert simulate(plan, shared).step > simulate(plan, times).step
        alone, apart = (simulate(plan, t.without("stream")).step for t in (shared, times))
        assert alone == pytest.approx(apart)  # no messages to share it with
        assert measure(plan, shared).ideal == measure(plan, times).ideal


def test_a_fused_backward_does_not_hold_up_the_forward_beside_it():
    """Its post_res waits for d_streams on the priority stream, as the engine has it, and compute goes on."""
    timeline = simulate(Plan(4, 2, 8, fused=True), dataclasses.replace(FLAT, stream=0.5)).timeline[1]
    early = 0
    for at, (op, _, arrived) in enumerate(timeline):
        if op.kind == WAIT and op.message.backward:
            beside = [start for op, start, _ in timeline[at:] if op[:2] == (FORWARD, "attention")]
            early += bool(beside) and beside[0] < arrived
    assert early


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


def test_help_explains_every_option_and_column(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "times, in milliseconds" in words
    for f in dataclasses.fields(Times):  # an option without its meaning is a KeyError
        assert MEANINGS[f.name] in words
    for column in ("step", "bubble", "a2a", "p2p", "efficiency", "in flight"):
        assert column in words.partition("Columns of the table")[2]


def test_picture_explains_its_colours_tints_and_numbers(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(picture, "save", lambda figure, path: kept.update(legend=figure.legends[0]))
    plan = Plan(2, 2, 4, replay=True)
    picture.draw(simulate(plan, dataclasses.replace(FLAT, replay=1)), plan, "x.png", "title")
    words = [text.get_text() for text in kept["legend"].get_texts()]
    assert {"forward", "backward", "replay", "chunk 1 of 2", "chunk 2 of 2"} <= set(words)
    assert "all-to-all" not in words  # unfused: no bar of it
    assert "number is a micro-batch" in kept["legend"].get_title().get_text()
    tints = [patch.get_alpha() for patch in kept["legend"].get_patches()][-2:]
    assert tints == [picture.tint(0, 2), picture.tint(1, 2)] and tints[0] < tints[1]


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
    main(["--pp", "4", "--vpp", "2", "--microbatches", "8", "--attention", "2.5", "--shared-link"])
    assert capsys.readouterr().out.splitlines()[:2] == table.splitlines()[:2]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="--draw 'mine': choose one of"):
        main(["--pp", "2", "--vpp", "1", "--microbatches", "2", "--png", str(picture), "--draw", "mine"])
