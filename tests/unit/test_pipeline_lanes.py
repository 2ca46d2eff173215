"""Programs run strictly in order with the slots there are, and no slot is written before its time."""

import dataclasses
import itertools

import pytest

from megatron_mhc.schedule import program as p
from megatron_mhc.schedule.check import Deadlock, check_in_order, check_slots
from megatron_mhc.schedule.lanes import AHEAD, InOrder, Lane, all_lanes, in_order, let_go, tracks
from megatron_mhc.schedule.program import Message, Op, Plan, build_program

MODES = {
    "unfused": {},
    "replay": dict(replay=True),
    "fused": dict(fused=True, replay=True),
    "evaluation": dict(forward_only=True),
    "one hop": dict(hops=1),
}


def programs(plan):
    return [build_program(plan, rank) for rank in range(plan.pp)]


def held(plan):
    return InOrder(plan, programs(plan), {}).held()


def sweep(pipelines, chunks, groups):
    for pp, vpp, boundary in itertools.product(pipelines, chunks, (p.WHOLE, p.SPLIT)):
        for microbatches in sorted({1, 2, pp - 1, pp, pp + 1, 2 * pp - 1, 2 * pp + 1, 3 * pp, 4 * pp}):
            for group in (None, *(pp + more for more in groups if vpp > 1 and pp + more <= microbatches)):
                yield dict(pp=pp, vpp=vpp, microbatches=microbatches, group=group, boundary=boundary)


@pytest.mark.parametrize("mode", MODES)
def test_every_program_runs_in_order_with_its_slots(mode):
    """Then neither one hardware queue nor a host that waits for its device can deadlock."""
    count = 0
    for settings in sweep((2, 3, 4), (1, 2, 3), (1, 3)):
        check_in_order(Plan(**settings, **MODES[mode]))
        count += 1
    assert count > 150


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_and_thousands_more(mode):
    layers = dict(layers=2) if mode == "fused" else {}
    for settings in sweep(range(2, 9), (1, 2, 3, 4), (1, 2, 5)):
        check_in_order(Plan(**settings, **MODES[mode], **layers))


def test_slots_are_what_a_receiver_holds_and_two_more():
    plan = Plan(2, 2, 8)
    most = held(plan)
    assert most == {
        Lane(0, 1, "streams"): 3,  # of both chunks: what is saved for backward stays where it came
        Lane(1, 0, "streams"): 2,
        Lane(0, 1, "d_streams"): 1,
        Lane(1, 0, "d_streams"): 1,
    }
    assert in_order(plan, programs(plan)).slots == {lane: n + AHEAD for lane, n in most.items()}
    assert {t.slots for t in tracks(Plan(2, 2, 8, boundary=p.SPLIT)).values()} == {1 + AHEAD}
    assert set(tracks(plan)) <= set(all_lanes(2)) and len(all_lanes(2)) == 10 and len(all_lanes(4)) == 40


def test_a_ring_that_closes_late_has_as_many_as_wait_there():
    """Groups above pp: the first rank is still at its first chunk when the last one sends for its second."""
    plan = Plan(8, 2, 32, group=9, hops=1)
    built = programs(plan)
    slots, tight = in_order(plan, built).slots, {lane: most + AHEAD for lane, most in held(plan).items()}
    more = {lane for lane in slots if slots[lane] > tight[lane]}
    assert more == {Lane(7, 0, "streams"), Lane(0, 7, "d_streams")}
    with pytest.raises(Deadlock, match="rank 0 at .*rank 7 at .*send"):
        check_in_order(plan, built, tight)
    check_in_order(plan, built, slots)


def test_one_slot_less_than_a_receiver_holds_is_a_deadlock():
    plan = Plan(2, 1, 6)
    most = held(plan)[Lane(0, 1, "streams")]
    check_in_order(plan, programs(plan), dict.fromkeys(tracks(plan), most))
    deep = Plan(4, 1, 8)  # whose second rank holds several
    slots = {lane: track.slots for lane, track in tracks(deep).items()}
    need = held(deep)[Lane(0, 1, "streams")]
    check_in_order(deep, programs(deep), slots | {Lane(0, 1, "streams"): need})
    with pytest.raises(Deadlock, match="rank 0 at Op.kind='send', what='streams'"):
        check_in_order(deep, programs(deep), slots | {Lane(0, 1, "streams"): need - 1})


def test_a_wait_in_front_of_the_send_that_it_follows_from_is_a_deadlock():
    plan = Plan(2, 1, 4)
    built = programs(plan)
    wait = next(op for op in built[0] if op.kind == p.WAIT and op.what == "d_streams")
    built[0].remove(wait)
    built[0].insert(0, wait)
    with pytest.raises(Deadlock, match="rank 0 at .*d_streams"):
        check_in_order(plan, built)


def test_messages_that_are_waited_for_in_another_order_are_noticed():
    plan = Plan(2, 1, 4, forward_only=True)
    built = programs(plan)
    first, second = (at for at, op in enumerate(built[1]) if op.kind == p.WAIT and op.microbatch in (1, 2))
    built[1][first], built[1][second] = built[1][second], built[1][first]
    with pytest.raises(ValueError, match="waited for in another order"):
        check_in_order(plan, built, dict.fromkeys(tracks(plan), 8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("boundary", [p.WHOLE, p.SPLIT])
def test_every_message_is_let_go_of_once_and_after_its_readers(mode, boundary):
    plan = Plan(3, 2, 7, boundary=boundary, **MODES[mode])
    for program in programs(plan):
        ends = {message: at for at, messages in let_go(plan, program).items() for message in messages}
        waits = {op.message: at for at, op in enumerate(program) if op.kind == p.WAIT}
        assert ends.keys() == waits.keys()
        for message, at in ends.items():
            assert at >= waits[message]
            here = (message.microbatch, message.receiver)
            readers = [
                i
                for i, op in enumerate(program)
                if (op.microbatch, op.stage) == here and op.kind in (p.FORWARD, p.BACKWARD, p.REPLAY)
            ]
            if message.name in ("streams", "d_streams"):  # saved for backward, or its gradient
                backward = [i for i in readers if program[i].kind != p.FORWARD]
                last = max(readers if plan.forward_only or message.name == "d_streams" else backward)
                assert at == last


def test_a_slot_that_is_written_too_early_is_noticed():
    plan = Plan(4, 2, 8)
    lane, track = next((lane, t) for lane, t in tracks(plan).items() if t.places != _in_turn(t))
    check_slots(lane, track)
    with pytest.raises(ValueError, match="would overwrite"):
        check_slots(lane, dataclasses.replace(track, places=_in_turn(track)))


def _in_turn(track):
    """Places of a ring, which would fit if messages were let go of in the order in which they come."""
    return tuple(number % track.slots for number in range(len(track.messages)))


def test_a_free_slot_is_the_one_let_go_of_first():
    messages = tuple(Message("streams", number, 0) for number in range(4))
    plan = Plan(2, 1, 4)
    run = InOrder(plan, [[Op(p.SEND, *message) for message in messages], []], {Lane(0, 1, "streams"): 3})
    assert run.go() == [0] and run.at == [3, 0]
