"""The Triton operations, forward and every gradient, against the reference in float64.

On a CPU they run in Triton's interpreter, at tiny sizes; with MEGATRON_MHC_GPU_TESTS=1 on the GPU, at
larger ones. Buffers are poisoned with NaN, so that an element that nobody writes shows.
"""

import pytest
import torch
from ops_cases import (
    CASES,
    COEFFICIENT,
    ON_GPU,
    STREAM,
    compare,
    error,
    inputs,
    reference_connection,
    replayed,
    triton_connection,
)

from megatron_mhc.ops import autograd
from megatron_mhc.ops.options import Options

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("tokens, n, channels, dtype, v4", CASES)
def test_outputs_and_every_gradient_match_float64(tokens, n, channels, dtype, v4):
    errors = compare(inputs(tokens, n, channels, dtype), dtype, v4)
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        wide = name in ("layer_input", "streams", "d x", "d f")
        assert value <= (STREAM if wide else COEFFICIENT)[dtype], name


def test_extreme_logits_stay_finite_and_rows_sum_to_one():
    tensors = inputs(6, 4, 32, torch.float32, logits=1e4)
    errors = compare(tensors, torch.float32, False)
    assert errors["h_res"] <= 2e-3  # rounding a logit of 1e4 to fp32 moves an entry by 6e-4
    _, _, h = triton_connection(*tensors, False)
    assert (h.h_res.sum(-1) - 1).abs().max() <= 1e-6


def test_tiny_and_huge_streams_match_float64():
    for scale in (1e-3, 1e3):
        errors = compare(inputs(4, 4, 32, torch.float32, scale=scale), torch.float32, False)
        assert max(errors.values()) <= 3e-5, errors


def test_results_repeat_bit_for_bit():
    tensors = inputs(*((2000, 4, 1024) if ON_GPU else (9, 4, 32)), torch.bfloat16)
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in tensors]
        layer_input, streams, _ = triton_connection(*leaves, False)
        (layer_input.float().square().sum() + streams.float().square().sum()).backward()
        runs.append([layer_input, streams, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_layer_input_alone_has_its_gradient():
    """Without post_res downstream, as in a frozen or probed connection."""
    tensors = inputs(4, 2, 16, torch.float32)
    exact = [t.double().requires_grad_() for t in tensors]
    ours = [t.clone().requires_grad_() for t in tensors]
    reference_connection(*exact, False)[0].square().sum().backward()
    x, weight, affine, _ = ours
    layer_input, _ = autograd.pre(x, weight, affine, Options(1e-6, 20, False))
    layer_input.square().sum().backward()
    assert error(x.grad, exact[0].grad) <= 1e-5
    assert error(weight.grad, exact[1].grad) <= 1e-5


@pytest.mark.parametrize("n, dtype", [(4, torch.bfloat16), (8, torch.float32)])
def test_a_frozen_phi_gets_no_gradient_and_the_others_keep_theirs(n, dtype):
    tensors, grads = inputs(5, n, 16, dtype), []
    for trained in (True, False):
        leaves = [t.clone().requires_grad_(trained or place != 1) for place, t in enumerate(tensors)]
        layer_input, streams, _ = triton_connection(*leaves, False, 2)
        (layer_input.float().square().sum() + streams.float().square().sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for place, (got, want) in enumerate(zip(*grads, strict=True)):
        assert got is not None and (want is None if place == 1 else torch.equal(got, want))


def test_second_post_res_is_refused():
    x, weight, affine, f = inputs(2, 2, 16, torch.float32)
    _, mappings = autograd.pre(x, weight, affine, Options(1e-6, 20, False))
    autograd.post_res(f, mappings)
    with pytest.raises(RuntimeError, match="post_res was called twice"):
        autograd.post_res(f, mappings)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: MEGATRON_MHC_GPU_TESTS=1")
def test_replayed_graph_on_another_stream_gives_the_same_bits():
    tensors = inputs(300, 4, 1024, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in tensors]

    def step():
        layer_input, streams, _ = triton_connection(*leaves, False)
        loss = layer_input.float().square().sum() + streams.float().square().sum()
        return [layer_input, streams, *torch.autograd.grad(loss, leaves)]

    want = [t.detach().clone() for t in step()]
    got = replayed(step)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
