"""The kernels for Hopper on a CPU, in the emulator of emulator/: the very sources.

Every case has few channels a block and few stages, so that groups, slices and rings are all there.
"""

import functools
import re

import pytest
import torch
from emulator.launch import Emulator, EmulatorError, Schedule, compiler
from ops_cases import COEFFICIENT, ON_GPU, STREAM, compare, error, inputs, norm_like
from ops_chains import biased, chain, three_in_a_row, two_in_a_row

from megatron_mhc.ops import autograd
from megatron_mhc.ops.hopper import compile, pre, pre_backward
from megatron_mhc.ops.kernels import HOPPER
from megatron_mhc.ops.options import Options

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="the GPU is there: test_hopper.py"),
    pytest.mark.skipif(compiler() is None, reason="the emulator needs g++"),
    pytest.mark.usefixtures("poisoned"),
]
BF16 = torch.bfloat16
WIDE = ("layer_input", "streams", "d x", "d f")
ALL = 0xFFFFFFFF
USUAL = Schedule()

# (tokens, channels, blocks, channels a block at most): slices x groups of blocks
SHAPES = [
    (1, 16, 4, 64),  # 1 x 1
    (37, 80, 4, 64),  # 2 x 2
    (40, 192, 3, 64),  # 3 x 1
    (70, 144, 4, 128),  # 2 x 2, or 3 x 1
    (33, 272, 3, 256),  # 2 x 1, or 3 x 1
    (230, 48, 1, 64),  # more tiles than the rings have places
]
RINGS = (230, 128, 4, 64)  # 2 x 2, and that
SLICES = (200, 1088, 17, 64)  # more slices than a tile has tokens


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hopper")


@pytest.fixture
def emulate(monkeypatch, folder):
    """`emulate(shape, ...)` puts the emulator in the GPU's place, and returns it."""

    def emulate(shape, schedule=USUAL, bugs=None, stages=(3, 6)):
        *_, blocks, widest = shape
        emulator = Emulator(folder, schedule, bugs or {})
        for module, number in zip((pre, pre_backward), stages, strict=True):
            monkeypatch.setattr(module, "MOST_STAGES", number)
            monkeypatch.setattr(module, "WIDEST", min(widest, module_widest[module]))
            monkeypatch.setattr(module, "multiprocessors", lambda device: blocks)
            monkeypatch.setattr(module, "kernel", emulator.kernel)
            monkeypatch.setattr(module, "raw_stream", lambda device: 0)
            monkeypatch.setattr(module, "_plan", plans[module])
        monkeypatch.setattr(autograd, "pre", functools.partial(by_triton, kernels=HOPPER))
        return emulator

    by_triton = autograd.pre
    module_widest = {module: module.WIDEST for module in (pre, pre_backward)}
    plans = {module: module._plan.__wrapped__ for module in (pre, pre_backward)}
    return emulate


def check(errors):
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        assert value <= (STREAM if name in WIDE else COEFFICIENT)[BF16], name


def everything(shape, v4=False, norm=None):
    """What both kernels write, of one connection with a bias of f and a writer."""
    tokens, channels, *_ = shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    generator = torch.Generator().manual_seed(1)
    g, dl = (torch.randn(like.shape, generator=generator).to(BF16) for like in (x, f))
    options = Options(1e-6, 20, v4)
    *made, norm_saved = pre.pre_forward(x, weight, affine, options, norm=norm)
    more = dict(writer=(made[1], affine), f_bias=dl[0].clone(), norm=norm, norm_saved=norm_saved)
    grads = pre_backward.pre_backward(x, g, f, dl, weight, affine, made[1], options, **more)
    return [t for t in (*made, norm_saved, *grads) if t is not None]


def mixed_and_read(shape, v4=False):
    """What the forward kernel writes behind the post_res of another connection: x, f, its mappings, that."""
    tokens, channels, *_ = shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    _, _, before, _ = pre.pre_forward(x, weight.flip(0), affine, Options(1e-6, 20, v4))
    return x, f, before, read_behind(shape, before, v4)


def read_behind(shape, before, v4=False, norm=None):
    """`mixed_and_read`, the mappings given."""
    tokens, channels, *_ = shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    options = Options(1e-6, 20, v4)
    made = pre.post_res_pre(x, f, before, f[0].clone(), weight, affine, options, norm=norm)
    return [t for t in made if t is not None]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a is b is None or (a.isfinite().all() and torch.equal(a, b))


def norm_of(shape, zero_centered=False, dtype=BF16):
    return norm_like(inputs(shape[0], 4, shape[1], BF16)[-1], zero_centered, dtype)


@functools.cache
def usual(shape, v4=False, folds=False):
    """`everything` in the first order that was tried."""
    return everything(shape, v4, norm_of(shape) if folds else None)


usual_mixed = functools.cache(mixed_and_read)


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_every_gradient_match_float64(emulate, shape, v4):
    emulator = emulate(shape)
    tokens, channels, *_ = shape
    check(compare(inputs(tokens, 4, channels, BF16), BF16, v4))
    assert [name for name, *_ in emulator.launched] == ["pre", "pre_backward"]


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, RINGS])
def test_behind_a_post_res_pre_reads_what_that_writes(emulate, shape, v4):
    emulator = emulate(shape)
    x, f, before, (streams, *read) = mixed_and_read(shape, v4)
    f = (f + f[0]).double()
    want = torch.einsum("tij,tjc->tic", before[:, 8:].double().unflatten(1, (4, 4)), x.double())
    want += before[:, 4:8, None].double() * f[:, None]
    assert error(streams, want) <= STREAM[BF16]
    _, weight, affine, _ = inputs(shape[0], 4, shape[1], BF16)
    options = Options(1e-6, 20, v4)
    same(read, pre.pre_forward(streams, weight, affine, options)[:3])
    assert [d["MIX"] for _, _, d in emulator.launched] == [0, 1, 0]


@pytest.mark.parametrize(
    "shape, v4, zero_centered, dtype",
    [
        (SHAPES[1], True, True, BF16),
        (SHAPES[3], False, False, torch.float32),
        (SHAPES[4], False, True, BF16),
        (SHAPES[5], False, False, BF16),
    ],
)
def test_a_norm_matches_float64(emulate, shape, v4, zero_centered, dtype):
    emulator = emulate(shape)
    tokens, channels, *_ = shape
    norm = norm_of(shape, zero_centered, dtype)
    errors = compare(inputs(tokens, 4, channels, BF16), BF16, v4, 2, norm)
    if dtype == BF16:
        assert errors.pop("d norm") <= STREAM[BF16]
    check(errors)
    assert [d["NORM"] for _, _, d in emulator.launched] == [1 + (dtype == BF16)] * 2


@pytest.mark.parametrize("shape", [SHAPES[1], RINGS])
def test_behind_a_post_res_a_norm_has_the_bits_of_pre(emulate, shape):
    emulate(shape)
    *_, before, _ = usual_mixed(shape)
    norm, (_, weight, affine, _) = norm_of(shape), inputs(shape[0], 4, shape[1], BF16)
    streams, *read = read_behind(shape, before, norm=norm)
    same(streams[None], usual_mixed(shape)[3][0][None])
    same(read, pre.pre_forward(streams, weight, affine, Options(1e-6, 20, False), norm=norm))


def test_streams_that_cancel_lose_the_digits_that_the_bound_says(emulate):
    """As by Triton (test_norm.py); products of bf16 are exact, their sums are rounded."""
    emulate(SHAPES[1])
    x, weight, affine, _ = inputs(37, 4, 80, BF16)
    x[:, 2:], weight[:], affine[:4] = -x[:, :2], 0, 0.3
    x[:, 3] += (x[:, 3] * 2**-7).to(BF16)  # a step or two of bf16
    norm = norm_of(SHAPES[1])._replace(eps=1e-12)
    y, *_, norm_saved = pre.pre_forward(x, weight, affine, Options(1e-6, 2, False), norm=norm)
    h, exact = affine[0].double().sigmoid(), x.double()
    gram = torch.einsum("tic,tjc->tij", exact, exact)
    of_l = h * h * gram.sum((1, 2))
    lost = 2**-22 * (h * h * gram.abs().sum((1, 2)) / of_l).max().item()
    wanted = norm.weight.double() * h * exact.sum(1) * (of_l / 80)[:, None].rsqrt()
    assert lost < 0.1 and error(y, wanted) <= STREAM[BF16] + lost


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_a_chain_that_works_ahead_matches_float64(emulate, shape):
    """--mhc-boundary fused."""
    emulator = emulate(shape)
    tensors = inputs(shape[0], 4, shape[1], BF16)
    ahead = chain(tensors, "all")
    names = [name if name == "pre_backward" else d["MIX"] for name, _, d in emulator.launched]
    assert names == [0, 1, 1, 1, *["pre_backward"] * 3]  # the last one's is for nobody here
    for got, without, exact in zip(ahead, chain(tensors, False), chain(tensors, None), strict=True):
        if got.numel() > 1:  # d alpha cancels to a few per cent of its terms
            assert error(got, exact) <= max(1.3 * error(without, exact), COEFFICIENT[BF16])


@pytest.mark.parametrize("biased", [False, True])
def test_one_node_has_the_bits_of_two(emulate, biased):
    emulator = emulate(SHAPES[1])
    got, want = (
        three_in_a_row((37, 4, 80), joined, biased=biased, kernels=HOPPER) for joined in (True, False)
    )
    same(got, want)
    names = [name for name, *_ in emulator.launched]
    assert names == [*["pre"] * 3, *["pre_backward"] * 3] * 2


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_other_numbers_of_iterations_match_float64(emulate, iterations, v4):
    emulate(SHAPES[1])
    check(compare(inputs(37, 4, 80, BF16), BF16, v4, iterations))


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("logits", [8.0, 100.0, 3000.0])
def test_extreme_logits_are_as_near_to_float64_as_tritons(monkeypatch, emulate, logits, v4):
    """Gradients through a sigmoid near 1 lose digits in fp32, whoever computes them."""
    tensors = inputs(20, 4, 80, BF16, logits=logits)
    tritons = compare(tensors, BF16, v4)
    emulate((20, 80, 4, 64))
    errors = compare(tensors, BF16, v4)
    for name, value in errors.items():
        limit = (STREAM if name in WIDE else COEFFICIENT)[BF16]
        assert value <= max(limit, 1.5 * tritons[name]), (name, value, tritons[name])


def test_logits_of_some_tokens_alone_are_extreme(emulate):
    """Then only some warps take the log domain."""
    emulate(RINGS)
    tensors = inputs(230, 4, 128, BF16)
    tensors[1][8:] *= 12
    check(compare(tensors, BF16, False))


@pytest.mark.parametrize("v4", [False, True])
def test_bits_of_a_token_do_not_depend_on_others(emulate, v4):
    """As they would where a warp took the log domain for eight tokens at once."""
    emulate(RINGS)
    x, weight, affine, _ = inputs(230, 4, 128, BF16)
    weight[8:] *= 12
    options = Options(1e-6, 20, v4)
    there, back = (pre.pre_forward(t, weight, affine, options) for t in (x, x.flip(0)))
    same([t.flip(0) for t in back[:3]], there[:3])


@pytest.mark.parametrize("v4", [False, True])
def test_a_linked_connection_gets_the_gradients_of_an_unlinked_one(emulate, v4):
    emulate(SHAPES[1])
    case = (37, 4, 80, BF16, v4)
    for a, b in zip(two_in_a_row(case), two_in_a_row(case, linked=False), strict=True):
        # Unlinked, df is Triton's, whose interpreter truncates; d alpha is one number.
        assert error(a, b.double()) <= (STREAM[BF16] if b.numel() > 1 else 1e-2)


@pytest.mark.parametrize("shape", [SHAPES[1], RINGS])
def test_df_of_the_connection_that_wrote_x_matches_float64(emulate, shape):
    emulate(shape)
    _, saved, _, dx, *_, df = everything(shape)
    _, _, affine, _ = inputs(shape[0], 4, shape[1], BF16)
    h_post = 2 * (saved[:, 4:8].double() * affine[25].double() + affine[4:8].double()).sigmoid()
    assert error(df, torch.einsum("tj,tjc->tc", h_post, dx.double())) <= 2.5e-3


def test_a_bias_of_f_gives_what_an_addition_before_gives(emulate):
    emulate(SHAPES[1])
    got, want = (biased((37, 4, 80, BF16), fold, True) for fold in (True, False))
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) <= (STREAM[BF16] if b.numel() > 1 else 3e-2)


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


FEW_ORDERS = ("lanes apart", "late copies", "a starved block", "few multiprocessors", "starved warp 9")


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same_bits(emulate, order):
    emulate(RINGS)
    want = usual(RINGS)
    emulate(RINGS, ORDERS[order])
    same(everything(RINGS), want)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same_bits_behind_a_post_res(emulate, order):
    emulate(RINGS)
    *_, before, want = usual_mixed(RINGS)
    emulate(RINGS, ORDERS[order])
    same(read_behind(RINGS, before), want)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(o, marks=() if o in FEW_ORDERS else pytest.mark.slow)  # as without a norm, for most
        for o in ORDERS
    ],
)
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


@pytest.mark.parametrize("warp", [12, 15])
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
    ("pre", "project_hastens"),
    ("pre", "sums_unawaited"),
    ("pre", "two_lanes_load"),
    ("pre", "all_lanes_wait"),
    ("pre", "unswizzled"),
    ("pre", "half_of_h_pre"),
    ("pre_mix", "mixed_f_overwritten"),
    ("pre_mix", "streams_overwritten"),
    ("pre_norm", "off_diagonal"),
    ("pre_backward", "stores_unawaited"),
    ("pre_backward", "coefficients_unawaited"),
    ("pre_backward", "dx_unawaited"),
    ("pre_backward", "stages_even"),
    ("pre_backward", "out_of_turn"),
    ("pre_backward", "out_of_bounds"),
    ("pre_backward_norm", "out_of_turn"),
    ("pre_backward_norm", "half_of_u"),
]
MORE_BUGS = [  # with -m slow
    ("pre", "arrival_uncounted"),
    ("pre", "one_slot"),
    ("pre", "wrong_tag"),
    ("pre", "sums_overwritten"),
    ("pre", "h_pre_unawaited"),
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
