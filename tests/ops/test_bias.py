"""A bias of F's output that the operations add as they read it: the bits of an addition of its own."""

import pytest
import torch
from ops_cases import DEVICE, ON_GPU, OPTIONS, inputs
from ops_chains import bias_like, biased, eighths
from thinned import each_value

from megatron_mhc.ops import autograd
from megatron_mhc.ops.triton import replay
from megatron_mhc.ops.triton.post_res import post_res_forward

CASES = [
    (5, 4, 48, torch.float32),
    (7, 4, 80, torch.bfloat16),
    (9, 2, 48, torch.float16),
    (4, 1, 16, torch.bfloat16),
    (3, 8, 16, torch.float32),
    (0, 4, 32, torch.bfloat16),
]
if ON_GPU:
    CASES += [(4096, 4, 2560, torch.bfloat16), (333, 2, 272, torch.bfloat16), (130, 8, 1024, torch.float16)]


HOW = {"": {}, "apart": dict(linked=False), "ahead": dict(ahead=True)}


@pytest.mark.parametrize("case, how", each_value(CASES, HOW, also=[(CASES[0], "ahead"), (CASES[1], "")]))
def test_a_bias_that_post_res_adds_has_the_bits_of_one_added_before(case, how):
    got, want = biased(case, True, **HOW[how]), biased(case, False, **HOW[how])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert not case[0] or all(grad.abs().max() > 0 for grad in got[-2:])


def test_a_bias_without_a_gradient_gets_none():
    x, weight, affine, f = (t.clone().requires_grad_() for t in inputs(3, 2, 16, torch.float32))
    _, mappings = autograd.pre(x, weight, affine, OPTIONS)
    f_bias = bias_like(f)
    autograd.post_res(f, mappings, f_bias).square().sum().backward()
    assert f_bias.grad is None and f.grad is not None


@pytest.mark.parametrize("tokens, n, channels, dtype", CASES)
def test_replay_of_connections_with_and_without_a_bias(tokens, n, channels, dtype):
    x, *_, f = inputs(tokens, n, channels, dtype)
    f, f_bias = eighths(f), eighths(bias_like(f))
    generator = torch.Generator().manual_seed(3)
    mappings = [torch.rand(tokens, n * n + 2 * n, generator=generator).to(DEVICE) for _ in range(2)]
    want = post_res_forward(x, f + f_bias, mappings[0])
    want = [want, post_res_forward(want, f, mappings[1])]
    row = [replay.Connection(mappings[0], f, None, f_bias), replay.Connection(mappings[1], f, None)]
    for a, b in zip(replay.replay(x, row, behind=True), want, strict=True):
        assert torch.equal(a, b)
