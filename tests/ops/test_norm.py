"""The RMSNorm in front of F, folded into `pre`, against the reference in float64 and against itself.

On a CPU in Triton's interpreter, as test_triton.py; `test_hopper_emulated.py` has the other kernels.
"""

import pytest
import torch
from ops_cases import COEFFICIENT, DEVICE, ON_GPU, STREAM, compare, error, inputs, norm_like
from ops_chains import kernels_of

from megatron_mhc.ops import autograd, boundary, reference
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.kernels import TRITON
from megatron_mhc.ops.options import Options
from megatron_mhc.ops.triton import replay
from megatron_mhc.ops.triton.post_res import post_res_forward
from megatron_mhc.ops.triton.pre import pre_forward

pytestmark = pytest.mark.usefixtures("poisoned")

BF16, F32 = torch.bfloat16, torch.float32
FEW = Options(1e-6, 2, False)  # iterations, which the interpreter takes long for

# (tokens, streams, channels, dtype, deepseek_v4), (zero-centred, dtype of the weight)
CASES = [
    ((5, 4, 48, F32, False), (False, F32)),
    ((7, 4, 80, BF16, True), (True, BF16)),
    ((37, 2, 48, torch.float16, False), (True, torch.float16)),
    ((70, 1, 16, F32, False), (False, F32)),
    ((3, 8, 48, F32, False), (False, BF16)),
    ((0, 4, 32, BF16, False), (False, BF16)),
]
if ON_GPU:
    CASES += [
        ((4096, 4, 2560, BF16, False), (True, BF16)),
        ((257, 4, 1040, BF16, True), (False, F32)),
        ((333, 2, 272, torch.float16, False), (False, torch.float16)),
        ((300, 4, 512, F32, False), (False, F32)),
        ((130, 8, 1024, BF16, False), (False, BF16)),
    ]
WIDE = ("layer_input", "streams", "d x", "d f")


def limit(name, dtype, norm):
    if name == "d norm":  # rounded to the weight's dtype
        return max(COEFFICIENT[dtype], STREAM[norm.weight.dtype])
    if ON_GPU and "alpha" in name:  # one number, and a sum over more tokens, in which much cancels
        return 1e-2
    return (STREAM if name in WIDE else COEFFICIENT)[dtype]


@pytest.mark.parametrize("case, of_norm", CASES)
def test_outputs_and_every_gradient_match_float64(case, of_norm):
    tokens, n, channels, dtype, v4 = case
    tensors = inputs(tokens, n, channels, dtype)
    # Of a single stream h_pre scales l, of which but for eps nothing is left in y: d h_pre would cancel.
    norm = norm_like(tensors[-1], *of_norm, eps=1.0 if n == 1 else 1e-5)
    errors = compare(tensors, dtype, v4, 2, norm)
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        assert value <= limit(name, dtype, norm), name
    assert tokens == 0 or errors["d norm"] > 0


def test_the_reference_is_torchs_norm():
    x, h_pre = torch.randn(5, 4, 48, device=DEVICE), torch.rand(5, 4, device=DEVICE)
    for norm in (norm_like(x[:, 0], False), norm_like(x[:, 0], True)):
        weight = norm.weight + norm.zero_centered
        want = torch.nn.functional.rms_norm(reference.pre(x, h_pre), (48,), weight, norm.eps)
        assert error(reference.pre(x, h_pre, norm), want.double()) <= 1e-6


def cancelling(tokens, n, channels, left):
    """x of which `left` of a stream is left in l, for an h_pre of biases alone; phi of zeros; affine; f."""
    x, weight, affine, f = (t.double() for t in inputs(tokens, n, channels, F32))
    h = affine[:n].sigmoid()
    x[:, -1] = (left * x[:, -1] - torch.einsum("n,tnc->tc", h[:-1], x[:, :-1])) / h[-1]
    return [x.float(), weight.float() * 0, affine.float(), f.float()]


@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3])
def test_streams_that_cancel_lose_the_digits_that_the_bound_says(left):
    """|l|^2 is made of products of streams: relative to it they are rounded as much as they are larger."""
    tensors = cancelling(5, 4, 48, left)
    x, _, affine, f = tensors
    norm = norm_like(f, eps=1e-12)
    h = affine[:4].double().sigmoid()
    gram = torch.einsum("tic,tjc->tij", x.double(), x.double())
    of_l = torch.einsum("tij,i,j->t", gram, h, h)
    lost = 2**-22 * (torch.einsum("tij,i,j->t", gram.abs(), h, h) / of_l).max().item()
    errors = compare(tensors, F32, False, 2, norm)
    print(lost, errors)
    for name in ("layer_input", "d norm", "d x", "streams"):
        assert errors[name] <= STREAM[F32] / left + lost, name


def test_streams_that_cancel_altogether_stay_finite():
    x, weight, affine, f = inputs(3, 2, 16, F32)
    x[:, 1], affine[:2], weight[:] = -x[:, 0], 0.3, 0
    leaves = [t.requires_grad_() for t in (x, weight, affine)]
    y, mappings = autograd.pre(*leaves, FEW, norm=norm_like(f))
    assert y.abs().max() <= 1e-3  # the rounding of a product, times 1 / sqrt(eps)
    (y.sum() + autograd.post_res(f, mappings).sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def chain(case, how, norm):
    """Output and gradients of three connections with the same parameters: reference, apart, linked, ahead."""
    tokens, n, channels, dtype = case
    exact = how == "reference"
    tensors = [*inputs(tokens, n, channels, dtype), norm.weight]
    leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in tensors]
    x, weight, affine, f, norm_weight = leaves
    norm = norm._replace(weight=norm_weight)
    for _ in range(3):
        if exact:
            bias, *alphas = affine.split([affine.numel() - 3, 1, 1, 1])
            logits = reference.mapping_logits(x, weight, alphas, bias, 1e-6)
            h = reference.mhc_mappings(logits, n, sinkhorn_iterations=2)
            x = reference.post_res(x, f + 0.5 * reference.pre(x, h.h_pre, norm), h.h_post, h.h_res)
            continue
        y, mappings = autograd.pre(x, weight, affine, FEW, norm=norm)
        next_pre = NextPre(TRITON, weight, affine, FEW, norm) if how == "ahead" else None
        x = autograd.post_res(f + 0.5 * y, mappings, linked=how != "apart", next_pre=next_pre)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [x, *torch.autograd.grad(x, leaves, g.to(x.dtype))]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [(5, 4, 48, F32), (7, 2, 80, BF16), (3, 8, 16, BF16)])
def test_linked_connections_give_the_bits_of_unlinked_ones(monkeypatch, case):
    norm = norm_like(inputs(*case)[-1])
    want = chain(case, "apart", norm)
    made, original = [], autograd.post_backward
    monkeypatch.setattr(autograd, "post_backward", lambda *args: (made.append(0), original(*args))[1])
    same(chain(case, "linked", norm), want)
    assert len(made) == 1  # the last one has its own


@pytest.mark.parametrize("case", [(5, 4, 48, BF16), (19, 2, 80, BF16), (3, 1, 16, BF16)])
def test_a_chain_that_projects_ahead_matches_float64(case):
    norm = norm_like(inputs(*case)[-1], True)
    runs = (chain(case, how, norm) for how in ("ahead", "apart", "reference"))
    for got, without, exact in zip(*runs, strict=True):
        assert error(got, exact) <= max(1.3 * error(without, exact), 1e-2)


def test_results_repeat_bit_for_bit():
    case = (2000, 4, 1024, BF16) if ON_GPU else (70, 2, 16, BF16)
    norm = norm_like(inputs(*case)[-1], dtype=BF16)
    same(chain(case, "linked", norm), chain(case, "linked", norm))


def two_connections(norm, as_one_node):
    """phi and affine; leaves, the last one F's output for both; the streams between."""
    kernels = kernels_of(4)
    x, weight, affine, f = leaves = [t.requires_grad_() for t in inputs(5, 4, 48, BF16)]
    leaves[3:] = [norm.weight.requires_grad_(), f.detach().view(5, 1, 48).requires_grad_()]
    _, mappings = autograd.pre(x.view(5, 1, -1), weight, affine, FEW, kernels, 4, norm)
    next_pre = NextPre(kernels, weight, affine, FEW, norm)
    post_res = boundary.post_res_pre if as_one_node else autograd.post_res
    streams = post_res(leaves[-1], mappings, **(dict(next_pre=next_pre) if as_one_node else {}))
    return (weight, affine), leaves, streams


def test_one_node_has_the_bits_of_two():
    norm, results = norm_like(inputs(5, 4, 48, BF16)[-1], dtype=BF16), []
    for as_one_node in (True, False):
        parameters, leaves, streams = two_connections(norm, as_one_node)
        made = boundary.taken(streams, *parameters, norm=norm)
        assert (made is not None) == as_one_node
        y, mappings = made or autograd.pre(streams, *parameters, FEW, kernels_of(4), 4, norm)
        last = autograd.post_res(leaves[-1], mappings)
        results.append([y, last, *torch.autograd.grad([y.sum(), last.sum()], leaves)])
    same(*results)


def changed(norm):
    with torch.no_grad():
        norm.weight.add_(0)  # as an optimizer step does
    return norm


OTHERS = {
    "the same": (lambda norm: norm, True),
    "a changed weight": (changed, False),
    "another weight": (lambda norm: norm._replace(weight=norm.weight.clone()), False),
    "another eps": (lambda norm: norm._replace(eps=1e-3), False),
    "zero-centred": (lambda norm: norm._replace(zero_centered=True), False),
    "none": (lambda norm: None, False),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_was_made_ahead_is_taken_for_the_very_norm_alone(other):
    reads, is_taken = OTHERS[other]
    norm = norm_like(inputs(5, 4, 48, BF16)[-1])
    parameters, _, streams = two_connections(norm, True)
    assert (boundary.taken(streams, *parameters, norm=reads(norm)) is not None) == is_taken


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("behind", [False, True])
def test_a_replay_has_the_bits_of_the_forward_pass(dtype, behind):
    """Of connections of which some have a norm."""
    x, weight, affine, f = inputs(5, 4, 48, dtype)
    norms = [norm_like(f), None, norm_like(f, True, BF16)]
    streams, row, outputs = [x], [], []
    for k, norm in enumerate(norms):
        y, _, mappings, norm_saved = pre_forward(streams[-1], weight * (k + 1), affine, FEW, norm=norm)
        out = torch.full_like(y, float("nan"))
        row.append(replay.Connection(mappings, f * (k + 1), out, None, norm, norm_saved))
        outputs.append((out, y))
        streams.append(post_res_forward(streams[-1], row[-1].f, mappings))
    got = replay.replay(x, row, behind)
    same(got, streams[1 : 4 if behind else 3])
    for out, y in outputs:
        assert torch.equal(out, y)
