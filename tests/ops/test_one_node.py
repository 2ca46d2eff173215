"""A post_res and the next `pre` in one node of the graph: the bits of two, whoever else reads the streams."""

import pytest
import torch
from ops_cases import DEVICE, ON_GPU, OPTIONS, each, inputs
from ops_chains import AHEAD, bias_like, eighths

from megatron_mhc.ops import autograd, boundary
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.kernels import HOPPER

BF16 = torch.bfloat16
CASES = [(5, 4, 48), (17, 2, 80), (4, 1, 16), (3, 8, 16), (0, 4, 32)]
if ON_GPU:
    CASES += [(4096, 4, 2560), (333, 4, 272)]
CASE = CASES[0]


def kernels_of(n):
    return HOPPER if ON_GPU and n == 4 else AHEAD


def row(
    case,
    joined,
    between=lambda x, weight: x,
    loss=lambda streams: 0.0,
    keep=False,
    biased=False,
    kernels=None,
):
    """Output and gradients of three connections; `between` stands behind the first, `loss` takes all."""
    tokens, n, channels = case
    kernels = kernels or kernels_of(n)
    leaves = [t.clone().requires_grad_() for t in inputs(tokens, n, channels, BF16)]
    x, weight, affine, f = leaves
    f_bias = eighths(bias_like(f)).requires_grad_() if biased else None
    streams, all_streams = x.view(tokens, 1, n * channels), []
    for k in range(3):
        made = boundary.taken(streams, weight, affine)
        if made is None:
            layer_input, mappings = autograd.pre(
                streams.view(tokens, n, channels), weight, affine, OPTIONS, kernels=kernels
            )
            made = layer_input.view(tokens, 1, channels), mappings
        layer_input, mappings = made
        out = eighths(f.view(layer_input.shape) + layer_input * 0.5)
        next_pre = NextPre(kernels, weight, affine, OPTIONS)
        if joined and k < 2:
            assert boundary.can_join(mappings, out, next_pre)
            streams = boundary.post_res_pre(out, mappings, next_pre, f_bias)
        else:
            streams = autograd.post_res(out, mappings, f_bias, next_pre=next_pre if k < 2 else None)
        if k == 0:
            streams = between(streams, weight)
        all_streams.append(streams)
    g = torch.randn(streams.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    total = (streams.float() * g).sum() + loss(all_streams)
    leaves += [f_bias] if biased else []
    grads = each(torch.autograd.grad(total, leaves, retain_graph=keep))
    return [streams, *grads, *(each(torch.autograd.grad(total, leaves)) if keep else [])]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def passes(monkeypatch):
    """The names of the nodes whose forward pass ran."""
    made = []
    for kind in (autograd._Pre, autograd._PostRes, boundary._Boundary):

        def counted(*args, kind=kind, original=kind.forward):
            made.append(kind.__name__)
            return original(*args)

        monkeypatch.setattr(kind, "forward", staticmethod(counted))
    return made


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_node_has_the_bits_of_two(passes, case, biased):
    want = row(case, False, biased=biased)
    assert passes == ["_Pre", "_PostRes"] * 3
    passes.clear()
    same(row(case, True, biased=biased), want)
    assert passes == ["_Pre", "_Boundary", "_Boundary", "_PostRes"]


def test_a_viewless_copy_is_the_very_tensor():
    from megatron_mhc.layer import viewless

    def keep(x, weight):
        assert viewless(x) is x
        return x

    row(CASE, True, keep)


def change_phi(x, weight):
    weight.data.add_(0)  # leaves its version
    with torch.no_grad():
        weight.add_(0)  # as an optimizer step does
    return x


def change_streams(x, weight):
    return x * 1.0


def hook(x, weight):
    x.register_hook(lambda g: g * 2)
    return x


@pytest.mark.parametrize("between", [change_streams, hook])
def test_streams_that_others_change_or_watch_are_read_anew(passes, between):
    want = row(CASE, False, between)
    passes.clear()
    same(row(CASE, True, between), want)
    assert passes == ["_Pre", "_Boundary", "_Pre", "_Boundary", "_PostRes"]


def test_what_another_phi_has_made_is_not_taken():
    (x, weight, affine, f), kernels = inputs(*CASE, BF16), kernels_of(4)
    _, mappings = autograd.pre(x, weight, affine, OPTIONS, kernels)
    for changed in (0, 1):
        streams = boundary.post_res_pre(f, mappings, NextPre(kernels, weight, affine, OPTIONS))
        assert boundary.taken(streams, weight.clone(), affine) is None
        assert boundary.taken(streams, weight, affine) is None  # one asks once
        _, mappings = autograd.pre(x, weight, affine, OPTIONS, kernels)
        streams = boundary.post_res_pre(f, mappings, NextPre(kernels, weight, affine, OPTIONS))
        (weight, affine)[changed].add_(0)
        assert boundary.taken(streams, weight, affine) is None
        _, mappings = autograd.pre(x, weight, affine, OPTIONS, kernels)


@pytest.mark.parametrize("which", [0, 1])
def test_other_readers_of_the_streams_have_their_gradient_added(which):
    def loss(streams):
        return (streams[which].float() * 3).sum()

    same(row(CASE, True, loss=loss), row(CASE, False, loss=loss))


def test_a_second_backward_gives_the_same():
    _, *grads = row(CASE, True, keep=True)
    same(grads[len(grads) // 2 :], grads[: len(grads) // 2])


@pytest.mark.parametrize("reader", ["layer input", "streams", "none of them"])
def test_gradients_by_one_output_alone(reader):
    """As of a probe, or where what was made ahead is not asked for."""

    def grads(joined):
        x, weight, affine, f = leaves = [t.requires_grad_() for t in inputs(*CASE, BF16)]
        first, mappings = autograd.pre(x, weight, affine, OPTIONS, kernels_of(4))
        next_pre = NextPre(kernels_of(4), weight, affine, OPTIONS)
        if joined:
            streams = boundary.post_res_pre(f, mappings, next_pre)
            layer_input, _ = boundary.taken(streams, weight, affine)
        else:
            streams = autograd.post_res(f, mappings)
            layer_input, _ = autograd.pre(streams, weight, affine, OPTIONS, kernels_of(4))
        chosen = {"layer input": layer_input, "streams": streams, "none of them": first}[reader]
        return torch.autograd.grad(chosen.float().square().sum(), leaves, allow_unused=True)

    for got, want in zip(grads(True), grads(False), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_a_second_post_res_is_refused():
    (x, weight, affine, f), kernels = inputs(*CASE, BF16), kernels_of(4)
    _, mappings = autograd.pre(x, weight, affine, OPTIONS, kernels)
    next_pre = NextPre(kernels, weight, affine, OPTIONS)
    boundary.post_res_pre(f, mappings, next_pre)
    with pytest.raises(RuntimeError, match="post_res was called twice"):
        boundary.post_res_pre(f, mappings, next_pre)
