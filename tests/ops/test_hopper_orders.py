"""The kernels for Hopper in the emulator: every order gives the same bits, and planted bugs are found."""

import functools
import re

import pytest
import torch
from emulator.launch import EmulatorError, Schedule
from ops_cases import compare, error, inputs
from ops_emulated import (
    BF16,
    MARKS,
    RINGS,
    SHAPES,
    SLICES,
    WIDE,
    check,
    everything,
    norm_of,
    read_behind,
    same,
    usual,
    usual_mixed,
)

from megatron_mhc.ops.hopper import compile, pre_backward

pytestmark = MARKS
ALL = 0xFFFFFFFF
USUAL = Schedule()

ORDERS = {
    "in turn": Schedule(order=0),
    "another seed": Schedule(seed=2),
    "lanes apart": Schedule(order=2),
    "late copies": Schedule(copies=1),
    "copies at once": Schedule(copies=2, order=2),
    "late blocks": Schedule(late_blocks=True),
    "a starved block": Schedule(order=2, starved_block=0, starved_warps=ALL, starved_lanes=ALL),
    "starved first lanes": Schedule(order=2, starved_warps=ALL, starved_lanes=1),
    "starved other lanes": Schedule(order=2, starved_warps=ALL, starved_lanes=ALL - 1),
    # a group of two at a time
    "few multiprocessors": Schedule(resident=2),
    "few multiprocessors, late blocks": Schedule(resident=3, late_blocks=True, copies=1),
    **{f"starved warp {w}": Schedule(seed=w + 1, starved_warps=1 << w, starved_lanes=ALL) for w in range(16)},
}


# By default one warp of each role: it projects, aggregates, finishes, loads.
ROLES = {f"starved warp {w}" for w in (0, 8, 11, 15)}
EACH_ORDER = [
    pytest.param(o, marks=pytest.mark.slow if o.startswith("starved warp") and o not in ROLES else ())
    for o in ORDERS
]
# With a norm, of whose code a part alone is another: it computes products beside the projection, lays out u.
FEW = ("lanes apart", "late copies", "a starved block", "starved warp 9")
FEW_ORDERS = [pytest.param(o, marks=() if o in FEW else pytest.mark.slow) for o in ORDERS]


@pytest.mark.parametrize("order", EACH_ORDER)
def test_every_order_gives_the_same_bits(emulate, order):
    emulate(RINGS)
    want = usual(RINGS)
    emulate(RINGS, ORDERS[order])
    same(everything(RINGS), want)


@pytest.mark.parametrize("order", EACH_ORDER)
def test_every_order_gives_the_same_bits_behind_a_post_res(emulate, order):
    emulate(RINGS)
    *_, before, want = usual_mixed(RINGS)
    emulate(RINGS, ORDERS[order])
    same(read_behind(RINGS, before), want)


@pytest.mark.parametrize("order", FEW_ORDERS)
def test_every_order_gives_the_same_bits_with_a_norm(emulate, order):
    emulate(RINGS)
    want = usual(RINGS, folds=True)
    emulate(RINGS, ORDERS[order])
    same(everything(RINGS, norm=norm_of(RINGS)), want)


@pytest.mark.slow
@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("shape", SHAPES + [RINGS])
@pytest.mark.parametrize("seed", range(2))
def test_more_orders_give_the_same_bits(emulate, seed, shape, v4):
    emulate(shape)
    want = usual(shape, v4)
    for order in (1, 2):
        for copies in (0, 1):
            for starved in (0, *(1 << w for w in range(16))):
                schedule = Schedule(
                    100 + seed, order, copies, 1 << 20, seed % 2 > 0, seed % 3 - 1, starved, ALL
                )
                emulate(shape, schedule)
                same(everything(shape, v4), want)


@pytest.mark.parametrize("warp", [pytest.param(12, marks=pytest.mark.slow), 15])
def test_more_slices_than_tokens_of_a_tile(emulate, warp):
    """Then a slice has no token of some tiles."""
    emulate(SLICES)
    want = usual(SLICES)
    emulate(SLICES, Schedule(order=2, starved_block=warp, starved_warps=1 << warp, starved_lanes=ALL))
    same(everything(SLICES), want)


def test_tokens_prepared_one_at_a_time_give_the_same(emulate, monkeypatch):
    """As where there are many slices; only the sums over tokens of the biases and alphas go by other ways."""
    emulate(RINGS)
    want = usual(RINGS)
    monkeypatch.setattr(pre_backward, "FEW", 0)
    emulator = emulate(RINGS, Schedule(seed=3, order=1))
    got = everything(RINGS)
    assert [defines["TOGETHER"] for name, _, defines in emulator.launched if name == "pre_backward"] == [1]
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b) if place != 5 else error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("logits", [1.0, 3000.0])
def test_as_many_blocks_as_a_gpu_has(emulate, logits):
    emulate((300, 512, 132, 256), stages=(10, 9))
    check(
        {k: v for k, v in compare(inputs(300, 4, 512, BF16, logits=logits), BF16, False).items() if k in WIDE}
    )


# The faults that the emulator has to find: BUG(name)s of the sources, planted in one kernel. pre_mix is
# pre behind a post_res, *_norm has a norm.
BUGS = [
    ("pre", "arrival_missing"),
    ("pre", "other_parity"),
    ("pre", "two_lanes_load"),
    ("pre", "unswizzled"),
    ("pre_mix", "mixed_f_overwritten"),
    ("pre_mix", "streams_overwritten"),
    ("pre_norm", "off_diagonal"),
    ("pre_backward", "stores_unawaited"),
    ("pre_backward", "stages_even"),
    ("pre_backward", "out_of_bounds"),
    ("pre_backward_norm", "out_of_turn"),
    ("pre_backward_norm", "half_of_u"),
]
MORE_BUGS = [  # with -m slow
    ("pre_backward", "out_of_turn"),
    ("pre_backward", "dx_unawaited"),
    ("pre_backward", "coefficients_unawaited"),
    ("pre", "all_lanes_wait"),
    ("pre", "sums_unawaited"),
    ("pre", "project_hastens"),
    ("pre", "arrival_uncounted"),
    ("pre", "one_slot"),
    ("pre", "wrong_tag"),
    ("pre", "sums_overwritten"),
    ("pre", "h_pre_unawaited"),
    ("pre", "half_of_h_pre"),
    ("pre_norm", "gram_overwritten"),
    ("pre_mix", "mixing_unawaited"),
    ("pre_mix", "before_unawaited"),
    ("pre_backward", "one_slot"),
    ("pre_backward", "warp_left_out"),
    ("pre_backward", "coefficients_overwritten"),
    ("pre_backward", "tile_overwritten"),
    ("pre_backward", "f_overwritten"),
    ("pre_backward", "half_forgotten"),
]


def find(emulate, shape, kernel, bug, orders):
    """The first order in which the bug shows."""
    emulate(shape)
    if kernel == "pre_mix":
        *_, before, want = usual_mixed(shape)
        compute = functools.partial(read_behind, shape, before)
    elif kernel.endswith("_norm"):
        want, norm = usual(shape, folds=True), norm_of(shape)
        compute = functools.partial(everything, shape, norm=norm)
    else:
        want, compute = usual(shape), functools.partial(everything, shape)
    for order in orders:
        emulate(shape, order, {kernel.removesuffix("_mix").removesuffix("_norm"): bug})
        try:
            got = compute()
        except EmulatorError as found:
            print(order, found)
            return str(found)
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            return "other results"
    raise AssertionError("nothing shows")


@pytest.mark.parametrize(
    "kernel, bug", [*BUGS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_BUGS)]
)
def test_a_planted_bug_is_found(emulate, kernel, bug):
    apart = (Schedule(seed=s, order=2, copies=s % 2) for s in range(2, 14))
    find(emulate, RINGS, kernel, bug, [USUAL, *reversed(ORDERS.values()), *apart])


def test_every_bug_that_the_sources_name_is_planted_and_none_in_a_build_for_a_gpu():
    texts = {path.name: path.read_text() for path in compile.HERE.glob("*.cu*")}
    asked = {name for text in texts.values() for name in re.findall(r"\bBUG\((\w+)\)(?! false)", text)}
    assert asked == {name for _, name in BUGS + MORE_BUGS}
    assert "#define BUG(name) false" in texts["shape.cuh"]
