"""The kernels for Hopper on a CPU, in the emulator of emulator/: the very sources.

Every case has few channels a block and few stages, so that groups, slices and rings are all there.
"""

import pytest
import torch
from ops_cases import COEFFICIENT, STREAM, compare, error, inputs
from ops_chains import biased, chain, three_in_a_row, two_in_a_row
from ops_emulated import (
    BF16,
    MARKS,
    RINGS,
    SHAPES,
    WIDE,
    check,
    everything,
    mixed_and_read,
    norm_of,
    read_behind,
    same,
    usual_mixed,
)
from thinned import each_value

from megatron_mhc.ops.hopper import pre
from megatron_mhc.ops.kernels import HOPPER
from megatron_mhc.ops.options import Options

pytestmark = MARKS


@pytest.mark.parametrize("shape, v4", each_value(SHAPES, [True, False]))
def test_outputs_and_every_gradient_match_float64(emulate, shape, v4):
    emulator = emulate(shape)
    tokens, channels, *_ = shape
    check(compare(inputs(tokens, 4, channels, BF16), BF16, v4))
    assert [name for name, *_ in emulator.launched] == ["pre", "pre_backward"]


@pytest.mark.parametrize("shape, v4", each_value([*SHAPES, RINGS], [True, False]))
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


def test_without_phis_gradient_the_others_keep_their_bits(emulate):
    emulator, norm = emulate(SHAPES[1]), norm_of(SHAPES[1])
    want = everything(SHAPES[1], norm=norm)
    *made, dx, d_affine, df, d_norm = everything(SHAPES[1], norm=norm, with_dphi=False)
    same([*made, dx, d_affine, df, d_norm], [*want[:5], *want[6:]])
    assert [d.get("DPHI") for _, _, d in emulator.launched] == [None, 1, None, 0]


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


@pytest.mark.parametrize("shape", [SHAPES[1], pytest.param(SHAPES[2], marks=pytest.mark.slow), SHAPES[3]])
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


@pytest.mark.parametrize("iterations, v4", each_value([1, 3], [False, True]))
def test_other_numbers_of_iterations_match_float64(emulate, iterations, v4):
    emulate(SHAPES[1])
    check(compare(inputs(37, 4, 80, BF16), BF16, v4, iterations))


@pytest.mark.parametrize("logits, v4", each_value([8.0, 100.0, 3000.0], [False, True], also=[(3000.0, True)]))
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
