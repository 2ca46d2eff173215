"""Two connections in a row: the second one's backward makes the first one's df, bit for bit."""

import pytest
import torch
from test_triton import DEVICE, ON_GPU, inputs

from megatron_mhc.ops import autograd
from megatron_mhc.ops.options import Options

CASES = [
    (5, 4, 48, torch.float32, False),
    (7, 4, 80, torch.bfloat16, True),
    (9, 2, 48, torch.float16, False),
    (3, 8, 16, torch.bfloat16, False),
    (4, 1, 16, torch.bfloat16, False),
    (0, 4, 32, torch.bfloat16, False),
]
if ON_GPU:
    CASES += [(4096, 4, 2560, torch.bfloat16, False), (333, 2, 272, torch.float16, True)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the launches of post_res's own backward."""
    made = []
    original = autograd.post_backward

    def counted(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(autograd, "post_backward", counted)
    return made


def run(case, linked=True, between=lambda x: x, extra=lambda x: 0.0, keep=False):
    """Gradients of two connections; `between` stands where a model has reshapes, `extra` joins the loss."""
    tokens, n, channels, dtype, v4 = case
    first, second = (
        [t.clone().requires_grad_() for t in inputs(tokens, n, channels, dtype, scale=s)] for s in (1.0, 2.0)
    )
    second[1].data.mul_(-1)
    x = first[0]
    for _, weight, bias, a_pre, a_post, a_res, f in (first, second):
        layer_input, mappings = autograd.pre(x, weight, bias, (a_pre, a_post, a_res), Options(1e-6, 20, v4))
        x = autograd.post_res(f + layer_input * 0.5, mappings, linked=linked)
        if weight is first[1]:
            x = between(x)
            middle = x
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).to(dtype)
    loss = (x.float() * g.float()).sum() + extra(middle)
    leaves = [*first, *second[1:]]
    grads = torch.autograd.grad(loss, leaves, retain_graph=keep)
    return (grads, torch.autograd.grad(loss, leaves)) if keep else grads


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_linked_connections_give_the_bits_of_unlinked_ones(calls, case):
    want = run(case, linked=False)
    assert len(calls) == 2
    same(run(case), want)
    assert len(calls) == (3 if case[0] else 4)  # the last one has its own


def test_reshapes_between_keep_the_link(calls):
    from megatron.core.utils import make_viewless_tensor

    def layers(x):
        x = x.view(1, *x.shape[:1], -1)
        return make_viewless_tensor(x, requires_grad=True, keep_graph=True).view(-1, *shape)

    shape = CASES[0][1:3]
    want = run(CASES[0], linked=False)
    same(run(CASES[0], between=layers), want)
    assert len(calls) == 3


def test_a_gradient_that_was_added_to_is_not_taken_for_the_link(calls):
    extra = dict(extra=lambda x: (x.float() * 3).sum())
    want = run(CASES[0], linked=False, **extra)
    same(run(CASES[0], **extra), want)
    assert len(calls) == 4


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_that_a_hook_changed_is_not_taken_for_the_link(calls, in_place):
    def double(g):
        return g.mul_(2) if in_place else g * 2

    def hooked(x):
        x.register_hook(double)
        return x

    want = run(CASES[0], linked=False, between=hooked)
    same(run(CASES[0], between=hooked), want)
    assert len(calls) == 4


def test_a_second_backward_gives_the_same(calls):
    once, again = run(CASES[0], keep=True)
    same(again, once)
    assert len(calls) == 2


def test_arithmetic_between_breaks_the_link_and_keeps_the_gradients(calls):
    want = run(CASES[0], linked=False, between=lambda x: x * 1.0)
    same(run(CASES[0], between=lambda x: x * 1.0), want)
    assert len(calls) == 4
