"""A post_res and the next `pre` in one node of the graph: the bits of two, whoever else reads the streams."""

import weakref

import pytest
import torch
from ops_cases import ON_GPU, OPTIONS, inputs
from ops_chains import kernels_of, three_in_a_row
from thinned import each_value

from megatron_mhc.ops import autograd, boundary
from megatron_mhc.ops.autograd import NextPre

BF16 = torch.bfloat16
CASES = [(5, 4, 48), (17, 2, 80), (4, 1, 16), (3, 8, 16), (0, 4, 32)]
if ON_GPU:
    CASES += [(4096, 4, 2560), (333, 4, 272)]
CASE = CASES[0]


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


@pytest.mark.parametrize("case, biased", each_value(CASES, [False, True], also=[(CASE, True)]))
def test_one_node_has_the_bits_of_two(passes, case, biased):
    want = three_in_a_row(case, False, biased=biased)
    assert passes == ["_Pre", "_PostRes"] * 3
    passes.clear()
    same(three_in_a_row(case, True, biased=biased), want)
    assert passes == ["_Pre", "_Boundary", "_Boundary", "_PostRes"]


def test_a_viewless_copy_is_the_very_tensor():
    from megatron_mhc.layer import viewless

    def keep(x, weight):
        assert viewless(x) is x
        return x

    three_in_a_row(CASE, True, keep)


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


def watch(x, weight):
    x.retain_grad()
    return x


@pytest.mark.parametrize("between", [change_streams, hook, watch])
def test_streams_that_others_change_or_watch_are_read_anew(passes, between):
    want = three_in_a_row(CASE, False, between)
    passes.clear()
    same(three_in_a_row(CASE, True, between), want)
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


@pytest.mark.parametrize("watched", [False, True])
def test_what_nobody_takes_goes_with_the_streams(watched):
    """As where a module's backward hook hands on other streams, or a checkpoint's replay ends."""
    (x, *parameters, f), kernels = [t.requires_grad_() for t in inputs(*CASE, BF16)], kernels_of(4)
    _, mappings = autograd.pre(x, *parameters, OPTIONS, kernels)
    streams = boundary.post_res_pre(f, mappings, NextPre(kernels, *parameters, OPTIONS))
    if watched:
        streams.retain_grad()
        assert boundary.taken(streams, *parameters) is None
    ahead = weakref.ref(streams.mhc_ahead)
    del streams
    assert ahead() is None


def test_streams_changed_before_their_backward_are_refused():
    (x, *parameters, f), kernels = [t.requires_grad_() for t in inputs(*CASE, BF16)], kernels_of(4)
    _, mappings = autograd.pre(x, *parameters, OPTIONS, kernels)
    streams = boundary.post_res_pre(f, mappings, NextPre(kernels, *parameters, OPTIONS))
    layer_input, _ = boundary.taken(streams, *parameters)
    streams.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer_input.float().sum().backward()


@pytest.mark.parametrize("which", [0, 1])
def test_other_readers_of_the_streams_have_their_gradient_added(which):
    def loss(streams):
        return (streams[which].float() * 3).sum()

    same(three_in_a_row(CASE, True, loss=loss), three_in_a_row(CASE, False, loss=loss))


def test_a_second_backward_gives_the_same():
    _, *grads = three_in_a_row(CASE, True, keep=True)
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
