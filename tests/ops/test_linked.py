"""Two connections in a row: the second one's backward makes the first one's df, bit for bit."""

import pytest
import torch
from ops_cases import ON_GPU
from ops_chains import two_in_a_row

from megatron_mhc.ops import autograd

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


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_linked_connections_give_the_bits_of_unlinked_ones(calls, case):
    want = two_in_a_row(case, linked=False)
    assert len(calls) == 2
    same(two_in_a_row(case), want)
    assert len(calls) == (3 if case[0] else 4)  # the last one has its own


def test_reshapes_between_keep_the_link(calls):
    from megatron.core.utils import make_viewless_tensor

    def layers(x):
        x = x.view(1, *x.shape[:1], -1)
        return make_viewless_tensor(x, requires_grad=True, keep_graph=True).view(-1, *shape)

    shape = CASES[0][1:3]
    want = two_in_a_row(CASES[0], linked=False)
    same(two_in_a_row(CASES[0], between=layers), want)
    assert len(calls) == 3


def test_a_gradient_that_was_added_to_is_not_taken_for_the_link(calls):
    extra = dict(extra=lambda x: (x.float() * 3).sum())
    want = two_in_a_row(CASES[0], linked=False, **extra)
    same(two_in_a_row(CASES[0], **extra), want)
    assert len(calls) == 4


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_that_a_hook_changed_is_not_taken_for_the_link(calls, in_place):
    def double(g):
        return g.mul_(2) if in_place else g * 2

    def hooked(x):
        x.register_hook(double)
        return x

    want = two_in_a_row(CASES[0], linked=False, between=hooked)
    same(two_in_a_row(CASES[0], between=hooked), want)
    assert len(calls) == 4


def test_a_second_backward_gives_the_same(calls):
    once, again = two_in_a_row(CASES[0], keep=True)
    same(again, once)
    assert len(calls) == 2


def test_arithmetic_between_breaks_the_link_and_keeps_the_gradients(calls):
    want = two_in_a_row(CASES[0], linked=False, between=lambda x: x * 1.0)
    same(two_in_a_row(CASES[0], between=lambda x: x * 1.0), want)
    assert len(calls) == 4
