"""Kernels that read with the weights of the connection in front (--mhc-read previous), against float64."""

import pytest
import torch
from emulator.launch import compiler
from megatron.core.transformer import TransformerConfig
from ops_cases import COEFFICIENT, DEVICE, ON_GPU, STREAM, each, error, inputs, norm_like
from ops_emulated import RINGS, SHAPES

from megatron_mhc import MHCConfig
from megatron_mhc.handed_on import first_weights
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import autograd, boundary, link, reference
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.hopper import pre as hopper_pre
from megatron_mhc.ops.kernels import HOPPER, TRITON
from megatron_mhc.ops.options import Options
from megatron_mhc.ops.triton import replay
from megatron_mhc.ops.triton.post_res import post_res_forward
from megatron_mhc.ops.triton.pre import pre_forward

BF16 = torch.bfloat16
# (tokens, streams, channels, dtype, deepseek_v4)
CASES = [
    (5, 4, 48, torch.float32, False),
    (7, 2, 32, torch.float32, True),
    (3, 1, 16, torch.float32, False),
    (3, 8, 16, torch.float32, False),
    (7, 4, 80, BF16, True),
    (9, 2, 48, torch.float16, False),
    (0, 4, 32, BF16, False),
]
if ON_GPU:
    CASES += [
        (257, 4, 1040, BF16, False),
        (4096, 4, 2560, BF16, False),
        (1000, 4, 4096, BF16, True),
        (333, 2, 272, torch.float16, False),
        (130, 8, 1024, BF16, False),
    ]


def leaves_of(case, exact=False, folds=False):
    """x, weight, affine, f and the first weights to read with, [T, n]; and a norm's weight."""
    tokens, n, channels, dtype, _ = case
    tensors = [*inputs(tokens, n, channels, dtype)]
    generator = torch.Generator().manual_seed(3)
    tensors.append(torch.randn(tokens, n, generator=generator).to(DEVICE))
    if folds:
        tensors.append(norm_like(tensors[3], dtype=torch.float32).weight)
    return [(t.double() if exact else t.clone()).requires_grad_() for t in tensors]


def gradients(case, leaves, outputs):
    """The outputs, and what every leaf gets of them."""
    generator = torch.Generator().manual_seed(1)
    dtypes = case[3], case[3], torch.float32
    noise = [torch.randn(out.shape, generator=generator).to(DEVICE) for out in outputs]
    grads = [g.to(dtype).to(out.dtype) for g, dtype, out in zip(noise, dtypes, outputs, strict=True)]
    return [*outputs, *each(torch.autograd.grad(outputs, leaves, grads))]


def by_reference(case, count=1, folds=False):
    """The last layer input, streams and weights of `count` connections, and every gradient, in float64."""
    leaves = leaves_of(case, exact=True, folds=folds)
    x, weight, affine, f, h_pre, *of_norm = leaves
    norm = norm_like(f)._replace(weight=of_norm[0]) if folds else None
    bias, *alphas = each([affine])
    for _ in range(count):
        layer_input = reference.pre(x, h_pre, norm)
        logits = reference.mapping_logits(x, weight, alphas, bias, 1e-6)
        h = reference.mhc_mappings(logits, x.shape[1], deepseek_v4=case[-1], sinkhorn_iterations=20)
        out = f if count == 1 else f + layer_input
        x, h_pre = reference.post_res(x, out, h.h_post, h.h_res), h.h_pre
    return gradients(case, leaves, [layer_input, x, h_pre])


def by_kernels(case, count=1, folds=False, kernels=TRITON, how="linked"):
    """The same; how: `apart`, `linked`, `ahead`, or `joined`: as one node."""
    tokens, n, channels, dtype, v4 = case
    leaves = leaves_of(case, folds=folds)
    x, weight, affine, f, h_pre, *of_norm = leaves
    norm = norm_like(f)._replace(weight=of_norm[0]) if folds else None
    options, shape = Options(1e-6, 20, v4), (tokens, 1, channels)
    streams = x.view(tokens, 1, n * channels)
    for k in range(count):
        made = boundary.taken(streams, weight, affine, h_pre, norm=norm)
        assert (made is not None) == (how == "joined" and k > 0)
        made = made or autograd.pre(
            streams, weight, affine, options, kernels=kernels, n=n, norm=norm, h_pre=h_pre
        )
        layer_input, mappings = made
        out, h_pre = f.view(shape) if count == 1 else f.view(shape) + layer_input, mappings.handed_on
        next_pre = None
        if how in ("ahead", "joined") and k < count - 1:
            next_pre = NextPre(kernels, weight, affine, options, norm, h_pre)
        if how == "joined" and next_pre is not None:
            streams = boundary.post_res_pre(out, mappings, next_pre)
        else:
            streams = autograd.post_res(out, mappings, None, how != "apart", next_pre)
    outputs = [layer_input.view(tokens, channels), streams.view(tokens, n, channels), h_pre]
    return gradients(case, leaves, outputs)


NAMES = "layer_input streams handed_on x weight bias alpha_pre alpha_post alpha_res f h_pre norm".split()
WIDE = {"layer_input", "streams", "x", "f"}


def check(case, folds, **how):
    """One connection, as near to float64 as those that read with their own weights."""
    pairs = zip(by_kernels(case, 1, folds, **how), by_reference(case, 1, folds), strict=True)
    for name, (got, want) in zip(NAMES, pairs, strict=False):
        # A norm divides by the weight of a stream alone: all of its gradient but eps's part cancels.
        if name != "h_pre" or not folds or case[1] > 1:
            assert error(got, want) <= (STREAM if name in WIDE else COEFFICIENT)[case[3]], name


def check_chain(case, folds, kernels, how):
    """Three connections, as near to float64 as those that share nothing."""
    made = by_kernels(case, 3, folds, kernels, how), by_kernels(case, 3, folds, kernels, "apart")
    for name, a, apart, b in zip(NAMES, *made, by_reference(case, 3, folds), strict=False):
        if a.numel() > 1:  # d alpha cancels to a few per cent of its terms
            assert error(a, b) <= max(1.3 * error(apart, b), COEFFICIENT[case[3]]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folds", [False, True])
def test_outputs_and_every_gradient_match_float64(poisoned, case, folds):
    check(case, folds)


@pytest.mark.parametrize("case", CASES[:2] + [CASES[4]])
def test_a_link_keeps_every_bit(poisoned, case):
    for a, b in zip(by_kernels(case, 3), by_kernels(case, 3, how="apart"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [(7, 4, 80, BF16, True), (37, 2, 96, BF16, False), (5, 1, 16, BF16, False)])
@pytest.mark.parametrize("folds", [False, True])
def test_a_writer_makes_the_next_layer_input(poisoned, case, folds):
    """--mhc-boundary fused: x' is not read for it again, but under a norm, which is of whole rows."""
    check_chain(case, folds, TRITON, "ahead")


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("folds", [False, True])
def test_a_replay_has_the_bits_of_forward(poisoned, n, folds):
    tokens, channels = 7, 48
    x, weight, affine, f = inputs(tokens, n, channels, BF16)
    norm = norm_like(f) if folds else None
    h_pre, first, row, wanted = torch.rand(tokens, n, device=DEVICE), x, [], []
    for k in range(3):
        handed = link.handed_to(h_pre)
        made = pre_forward(x, weight * (k + 1), affine, Options(1e-6, 20, False), norm=norm, handed=handed)
        layer_input, _, mappings, norm_saved = made
        out = torch.full_like(layer_input, float("nan"))
        row.append(replay.Connection(mappings, f * (k + 1), out, None, norm, norm_saved, h_pre))
        x = post_res_forward(x, f * (k + 1), mappings)
        wanted.append((layer_input, x))
        h_pre = handed.on
    streams = replay.replay(first, row, behind=True)
    for connection, got, (layer_input, want) in zip(row, streams, wanted, strict=True):
        assert torch.equal(connection.layer_input, layer_input) and torch.equal(got, want)


EMULATED = pytest.mark.skipif(ON_GPU or compiler() is None, reason="of the emulator, which needs g++")


@EMULATED
@pytest.mark.parametrize(
    "shape, v4, folds",
    [
        (SHAPES[1], True, False),
        (SHAPES[4], True, True),
        pytest.param(SHAPES[3], False, True, marks=pytest.mark.slow),
        pytest.param(SHAPES[5], False, False, marks=pytest.mark.slow),
    ],
)
def test_hoppers_match_float64(emulate, poisoned, shape, v4, folds):
    emulator, (tokens, channels, *_) = emulate(shape), shape
    check((tokens, 4, channels, BF16, v4), folds, kernels=HOPPER)
    assert [(name, d["PREVIOUS"]) for name, _, d in emulator.launched] == [("pre", 1), ("pre_backward", 1)]


@EMULATED
@pytest.mark.parametrize(
    "shape, v4, folds",
    [
        (SHAPES[2], True, True),
        (SHAPES[3], False, False),
        pytest.param(SHAPES[5], False, False, marks=pytest.mark.slow),
        pytest.param(RINGS, True, True, marks=pytest.mark.slow),
    ],
)
def test_behind_a_post_res_hoppers_have_the_bits_of_pre(emulate, poisoned, shape, v4, folds):
    emulator, (tokens, channels, *_) = emulate(shape), shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    norm, options = norm_like(f) if folds else None, Options(1e-6, 20, v4)
    *_, before, _ = hopper_pre.pre_forward(x, weight.flip(0), affine, options)
    handed = [link.handed_to(before[:, :4].contiguous()) for _ in range(2)]
    of = weight, affine, options, norm
    streams, *ahead = hopper_pre.post_res_pre(x, f, before, None, *of, handed=handed[0])
    alone = hopper_pre.pre_forward(streams, *of, handed=handed[1])
    for a, b in zip([*ahead, handed[0].on], [*alone, handed[1].on], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert [d["MIX"] for *_, d in emulator.launched] == [0, 1, 0]


@EMULATED
@pytest.mark.parametrize("how", ["joined", "ahead"])
def test_hoppers_in_a_row_match_float64(emulate, poisoned, how):
    emulator, (tokens, channels, *_) = emulate(SHAPES[1]), SHAPES[1]
    check_chain((tokens, 4, channels, BF16, False), False, HOPPER, how)
    mixes = [d["MIX"] for name, _, d in emulator.launched if name == "pre"]
    assert mixes == [0, 1, 1, 0, 0, 0]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("how", ["apart", "ahead", "joined"])
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize(
    "tokens, channels, v4", [(4096, 2560, False), (1000, 4096, True), (257, 1040, False)]
)
def test_hoppers_match_float64_on_a_gpu(how, folds, tokens, channels, v4):
    case = tokens, 4, channels, BF16, v4
    if how == "apart":
        check(case, folds, kernels=HOPPER)
    else:
        check_chain(case, folds, HOPPER, how)


def test_what_a_writer_made_for_other_weights_is_made_again(poisoned):
    """As for other values of phi: the layer input that was made ahead is of the weights handed on alone."""
    case = (7, 4, 80, BF16, False)
    x, weight, affine, f, h_pre = leaves_of(case)
    options, shape = Options(1e-6, 20, False), (7, 1, 80)
    streams = x.view(7, 1, 320)
    layer_input, mappings = autograd.pre(streams, weight, affine, options, TRITON, 4, None, h_pre)
    next_pre = NextPre(TRITON, weight, affine, options, None, mappings.handed_on)
    streams = autograd.post_res(f.view(shape) + layer_input, mappings, None, True, next_pre)
    other = torch.rand_like(mappings.handed_on)
    read, _ = autograd.pre(streams, weight, affine, options, TRITON, 4, None, other)
    alone, _ = autograd.pre(streams.detach(), weight, affine, options, TRITON, 4, None, other)
    assert torch.equal(read, alone)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("over", [[1], [0, 1, 2]])
def test_an_edge_of_a_graph_lies_between_pre_and_post_res(poisoned, backend, over):
    """`read_across` and `arrived`: the bits and the kernels of connections without an edge."""
    T, n, width = 6, 4, 48
    config = TransformerConfig(num_layers=1, hidden_size=width, num_attention_heads=1, params_dtype=BF16)
    config.use_cpu_initialization = not ON_GPU
    mhc = MHCConfig(read="previous", backend=backend, sinkhorn_iterations=2)
    modules = [HyperConnectionModule(config, mhc, k).to(DEVICE) for k in range(3)]
    for k, p in enumerate(p for module in modules for p in module.parameters()):
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 0.3
        p.data.copy_(values)
    x, *_, f = inputs(T, n, width, BF16)
    found = []
    for edges in ([], over):
        leaf = x.view(3, 2, n * width).clone().requires_grad_()
        streams, h_pre = leaf * 1, first_weights(leaf, n)
        for k, module in enumerate(modules):
            if k in edges:
                layer_input, crossing = module.read_across(streams, h_pre)
                assert len(crossing) == (6 if backend == "triton" else 4)
                streams, mappings = module.arrived(*crossing)
            else:
                layer_input, mappings = module(streams, h_pre)
            assert isinstance(mappings, reference.Coefficients) == (backend == "reference")
            streams = module.post_res(streams, f.view(3, 2, width) + layer_input, mappings)
            h_pre = module.handed_on(mappings)
        weights = [p for module in modules for p in module.parameters()]
        loss = (streams.float() * torch.arange(n * width, device=DEVICE)).sum() + h_pre.square().sum()
        found.append([streams, h_pre, *torch.autograd.grad(loss, [leaf, *weights])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
