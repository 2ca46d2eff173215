"""The kernels for Hopper against the reference in float64 and against themselves, on an H100 or H200.

MEGATRON_MHC_GPU_TESTS=1 python -m pytest tests/ops/test_hopper.py
"""

import functools

import pytest
import torch
from ops_cases import (
    COEFFICIENT,
    DEVICE,
    ON_GPU,
    STREAM,
    compare,
    error,
    inputs,
    norm_like,
    replayed,
    triton_connection,
)
from ops_chains import biased, chain, check_replay, connections, optimize, results, two_in_a_row

from megatron_mhc import MHCConfig
from megatron_mhc.backend import choose
from megatron_mhc.ops import autograd
from megatron_mhc.ops.hopper import pre, pre_backward
from megatron_mhc.ops.kernels import HOPPER, TRITON
from megatron_mhc.ops.options import Options, ReadNorm
from megatron_mhc.ops.triton import replay
from megatron_mhc.ops.triton.post_res import post_res_forward

BF16 = torch.bfloat16
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.skipif(not ON_HOPPER, reason="needs an H100 or H200: MEGATRON_MHC_GPU_TESTS=1"),
    pytest.mark.usefixtures("poisoned"),
]

# (tokens, channels)
SHAPES = [(1, 16), (16, 16), (37, 48), (257, 1040), (1000, 4096), (4096, 2560), (5, 7168), (0, 32)]
WIDE = ("layer_input", "streams", "d x", "d f")
ALPHA = 1e-2  # d alpha is one number, and a sum in which much cancels: most shapes are within COEFFICIENT


@pytest.fixture(autouse=True)
def by_hopper(monkeypatch):
    monkeypatch.setattr(autograd, "pre", functools.partial(autograd.pre, kernels=HOPPER))


@pytest.fixture
def by_triton(monkeypatch, by_hopper):
    """Call it to go back to Triton."""
    return lambda: monkeypatch.setattr(autograd, "pre", autograd.pre.func)


def check(errors):
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        limit = STREAM[BF16] if name in WIDE else ALPHA if "alpha" in name else COEFFICIENT[BF16]
        assert value <= limit, name


def step(leaves, v4=False):
    """Outputs and all gradients of one connection."""
    layer_input, streams, _ = triton_connection(*leaves, v4)
    loss = layer_input.float().square().sum() + streams.float().square().sum()
    return [layer_input, streams, *torch.autograd.grad(loss, leaves)]


def leaves_of(tokens, channels):
    return [t.requires_grad_() for t in inputs(tokens, 4, channels, BF16)]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_auto_takes_them():
    assert choose(MHCConfig(), 4096, BF16, "cuda") == "hopper"


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("tokens, channels", SHAPES)
def test_outputs_and_every_gradient_match_float64(tokens, channels, v4):
    check(compare(inputs(tokens, 4, channels, BF16), BF16, v4))


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_other_numbers_of_iterations_match_float64(iterations):
    for v4 in (False, True):
        check(compare(inputs(37, 4, 48, BF16), BF16, v4, iterations))


@pytest.mark.parametrize("tokens, channels", SHAPES[2:5])
def test_extreme_logits_stay_finite_and_rows_sum_to_one(tokens, channels):
    tensors = inputs(tokens, 4, channels, BF16, logits=3000.0)
    errors = compare(tensors, BF16, False)  # in which all must be finite
    print(errors)
    assert errors["layer_input"] <= STREAM[BF16]
    assert errors["h_res"] <= 2e-3 and errors["streams"] <= 5e-3  # fp32 logits of 1e4 are off by 5e-4
    _, _, h = triton_connection(*tensors, False)
    assert (h.h_res.sum(-1) - 1).abs().max() <= 1e-5
    compare(tensors, BF16, True)


def test_tiny_and_huge_streams_match_float64():
    for scale in (1e-3, 1e3):
        check(compare(inputs(37, 4, 48, BF16, scale=scale), BF16, False))


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("tokens, channels", [*SHAPES[:4], (4096, 2560), (0, 32)])
def test_a_bias_of_f_gives_what_an_addition_before_gives(tokens, channels, linked):
    case = (tokens, 4, channels, BF16)
    got, want = (biased(case, fold, linked) for fold in (True, False))
    for a, b in zip(got, want, strict=True):
        # f + f_bias is rounded there alone, so the gradient of h_post is another in the ninth bit; and of a
        # single number, as d alpha is, up to a few parts in 256.
        assert error(a, b.double()) <= (2 * STREAM[BF16] if b.numel() > 1 else 3e-2)


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("tokens, channels", SHAPES)
def test_linked_connections_give_the_gradients_of_unlinked_ones(monkeypatch, tokens, channels, v4):
    made, original = [], autograd.post_backward
    monkeypatch.setattr(autograd, "post_backward", lambda *args: (made.append(0), original(*args))[1])
    case = (tokens, 4, channels, BF16, v4)
    want = two_in_a_row(case, linked=False)
    assert len(made) == 2
    got = two_in_a_row(case)
    assert len(made) == (3 if tokens else 4)  # the last one has its own
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) <= STREAM[BF16]


@pytest.mark.parametrize("tokens, channels", [*SHAPES[:6], (3000, 4096), (0, 32)])
def test_a_chain_that_works_ahead_has_the_bits_of_one_that_does_not(tokens, channels):
    """--mhc-boundary fused."""
    tensors = inputs(tokens, 4, channels, BF16)
    same(chain(tensors, "all"), chain(tensors, False))


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("tokens, channels", SHAPES)
def test_mixed_streams_have_the_bits_of_post_res_and_are_read_as_by_pre(tokens, channels, v4):
    check_mixed(tokens, channels, v4)


def check_mixed(tokens, channels, v4=False):
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    options = Options(1e-6, 20, v4)
    _, _, before, _ = pre.pre_forward(x, weight.flip(0).contiguous(), affine, options)
    for f_bias in (None, torch.randn(channels, device=DEVICE).to(BF16)):
        made = pre.post_res_pre(x, f, before, f_bias, weight, affine, options)
        streams = post_res_forward(x, f, before, f_bias)
        same(made, [streams, *pre.pre_forward(streams, weight, affine, options)])


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("tokens, channels", SHAPES[2:5])
def test_one_way_by_these_kernels_and_the_other_by_tritons(monkeypatch, tokens, channels, back):
    """`saved` has one format."""
    there, back_again = (TRITON, HOPPER) if back else (HOPPER, TRITON)
    mixed = there._replace(pre_backward=back_again.pre_backward)
    monkeypatch.setattr(autograd, "pre", functools.partial(autograd.pre.func, kernels=mixed))
    check(compare(inputs(tokens, 4, channels, BF16), BF16, False))


@pytest.mark.parametrize("tokens, channels", [*SHAPES[:3], (4096, 2560), (333, 1040)])
def test_a_replay_has_the_bits_of_the_forward_pass(tokens, channels):
    """Recompute writes layer inputs again from the coefficients, by a Triton kernel."""
    check_replay((tokens, 4, channels, BF16, 3), True, pre.pre_forward)


@pytest.mark.parametrize("tokens, channels", [(37, 48), (2000, 1024), (1000, 4096)])
def test_results_repeat_bit_for_bit(tokens, channels):
    leaves = leaves_of(tokens, channels)
    first, *more = (step(leaves) for _ in range(3))
    for again in more:
        same(again, first)


@pytest.mark.parametrize("tokens, channels", [(300, 1024), (1000, 4096)])
def test_a_replayed_graph_on_another_stream_gives_the_same_bits(tokens, channels):
    leaves = leaves_of(tokens, channels)
    want = [t.detach().clone() for t in step(leaves)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        same(step(leaves), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            got = step(leaves)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    same(got, want)


@pytest.mark.parametrize("tokens, channels", [(300, 1024), (1000, 4096), (5, 7168)])
def test_another_kernel_on_the_gpu_changes_nothing(tokens, channels):
    """Blocks then start late and far apart, and wait for one another."""
    leaves = leaves_of(tokens, channels)
    want = step(leaves)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device=DEVICE, dtype=BF16)
    for _ in range(5):
        with torch.cuda.stream(side):
            for _ in range(20):
                b = a @ a
        same(step(leaves), want)
        assert b.shape == a.shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens, channels", SHAPES[:6])
def test_few_multiprocessors_match_float64(monkeypatch, tokens, channels, groups):
    """A group works through many tiles, more than its rings have places."""
    for module in (pre, pre_backward):
        enough = -(-channels // module.WIDEST) * groups
        monkeypatch.setattr(module, "multiprocessors", lambda device, enough=enough: enough)
    check(compare(inputs(tokens, 4, channels, BF16), BF16, False))
    check_mixed(tokens, channels)


@pytest.mark.parametrize("tokens, channels", [(37, 48), (1000, 4096)])
def test_a_frozen_phi_gets_no_gradient_and_the_others_keep_theirs(tokens, channels):
    leaves = leaves_of(tokens, channels)
    want = step(leaves)
    leaves[1].requires_grad_(False)
    layer_input, streams, _ = triton_connection(*leaves, False)
    loss = layer_input.float().square().sum() + streams.float().square().sum()
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    same([layer_input, streams, *torch.autograd.grad(loss, trained)], [*want[:3], *want[4:]])


# Of a norm: zero-centred, dtype of its weight.
NORMS = [(False, torch.float32), (True, BF16)]


@pytest.mark.parametrize("of_norm", NORMS)
@pytest.mark.parametrize("tokens, channels", [*SHAPES, (8192, 4096), (4096, 7168), (333, 6144)])
def test_a_norm_matches_float64(tokens, channels, of_norm):
    tensors = inputs(tokens, 4, channels, BF16)
    norm = norm_like(tensors[-1], *of_norm)
    errors = compare(tensors, BF16, of_norm[0], norm=norm)
    if norm.weight.dtype == BF16:
        assert errors.pop("d norm") <= STREAM[BF16]
    check(errors)


def test_a_norm_of_few_multiprocessors_matches_float64(monkeypatch):
    for module in (pre, pre_backward):
        enough = -(-1040 // module.WIDEST) * 2
        monkeypatch.setattr(module, "multiprocessors", lambda device, enough=enough: enough)
    tensors = inputs(257, 4, 1040, BF16)
    check(compare(tensors, BF16, False, norm=norm_like(tensors[-1])))


@pytest.mark.parametrize("tokens, channels", [*SHAPES, (8192, 4096)])
def test_behind_a_post_res_a_norm_has_the_bits_of_pre(tokens, channels):
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    norm, options = norm_like(f, dtype=BF16), Options(1e-6, 20, False)
    _, _, before, _ = pre.pre_forward(x, weight.flip(0).contiguous(), affine, options)
    for f_bias in (None, torch.randn(channels, device=DEVICE).to(BF16)):
        made = pre.post_res_pre(x, f, before, f_bias, weight, affine, options, norm=norm)
        streams = post_res_forward(x, f, before, f_bias)
        same(made, [streams, *pre.pre_forward(streams, weight, affine, options, norm=norm)])


@pytest.mark.parametrize("tokens, channels", [(37, 48), (1000, 4096), (333, 1040)])
def test_a_replay_of_a_norm_has_the_bits_of_the_forward_pass(tokens, channels):
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    norms = norm_like(f), None, norm_like(f, True, BF16)
    streams, row, wanted = [x], [], []
    for norm in norms:
        made = pre.pre_forward(streams[-1], weight, affine, Options(1e-6, 20, False), norm=norm)
        y, _, mappings, norm_saved = made
        row.append(replay.Connection(mappings, f, torch.full_like(y, float("nan")), None, norm, norm_saved))
        wanted.append(y)
        streams.append(post_res_forward(streams[-1], f, mappings))
    same(replay.replay(x, row, True), streams[1:])
    same([entry.layer_input for entry in row], wanted)


@pytest.mark.parametrize("back", [False, True])
def test_a_norm_one_way_by_these_kernels_and_the_other_by_tritons(monkeypatch, back):
    there, back_again = (TRITON, HOPPER) if back else (HOPPER, TRITON)
    mixed = there._replace(pre_backward=back_again.pre_backward)
    monkeypatch.setattr(autograd, "pre", functools.partial(autograd.pre.func, kernels=mixed))
    tensors = inputs(257, 4, 1040, BF16)
    check(compare(tensors, BF16, False, norm=norm_like(tensors[-1])))


@pytest.mark.parametrize("tokens, channels", [(2000, 1024), (1000, 4096)])
def test_results_with_a_norm_repeat_bit_for_bit_alone_and_in_graphs(tokens, channels):
    leaves = leaves_of(tokens, channels)
    leaves.append(norm_like(leaves[-1], True, BF16).weight.requires_grad_())

    def norm_step():
        norm = ReadNorm(leaves[-1], 1e-5, True)
        y, streams, _ = triton_connection(*leaves[:4], False, norm=norm)
        loss = (y.float() * leaves[3].detach()).sum() + streams.float().square().sum()
        return [y, streams, *torch.autograd.grad(loss, leaves)]

    want = [t.detach().clone() for t in norm_step()]
    for _ in range(2):
        same(norm_step(), want)
    got = replayed(norm_step)
    same(got, want)


def test_compiled_graphs_give_the_results_of_eager():
    torch._dynamo.reset()
    tensors = inputs(1000, 4, 2560, BF16)
    got, want = (results(run, tensors, False) for run in (optimize(connections), connections))
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) <= STREAM[BF16]  # eager connections are linked, compiled ones are not


def test_results_are_tritons_to_rounding(by_triton):
    leaves = leaves_of(4096, 2560)
    got = step(leaves)
    by_triton()
    for a, b in zip(got, step(leaves), strict=True):
        assert error(a, b.double()) <= STREAM[BF16]


def test_several_streams_at_a_time_change_nothing():
    """Launches then share the multiprocessors; a group of blocks is a fourth of them."""
    leaves = leaves_of(1000, 4096)
    want = step(leaves)
    torch.cuda.synchronize()
    sides, got = [torch.cuda.Stream() for _ in range(3)], []
    for _ in range(5):
        for side in sides:
            with torch.cuda.stream(side):
                got.append(step([t.detach().requires_grad_() for t in leaves]))
    torch.cuda.synchronize()
    for each in got:
        same(each, want)
