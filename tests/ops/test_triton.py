"""The Triton operations, forward and every gradient, against the reference in float64.

On a CPU they run in Triton's interpreter, at tiny sizes; with MEGATRON_MHC_GPU_TESTS=1 on the GPU, at
larger ones. Buffers are poisoned with NaN, so that an element that nobody writes shows.
"""

import os

import pytest
import torch

from megatron_mhc.ops import autograd, reference
from megatron_mhc.ops.options import Options

ON_GPU = bool(os.environ.get("MEGATRON_MHC_GPU_TESTS"))
DEVICE = "cuda" if ON_GPU else "cpu"

# (tokens, streams, channels, dtype, deepseek_v4)
CASES = [
    (5, 4, 48, torch.float32, False),
    (5, 4, 48, torch.float32, True),
    (3, 2, 32, torch.float32, False),
    (2, 1, 16, torch.float32, False),
    (3, 8, 16, torch.float32, False),
    (7, 4, 80, torch.bfloat16, False),
    (9, 2, 48, torch.float16, True),
    (1, 4, 16, torch.float32, False),
    (0, 4, 32, torch.bfloat16, False),
]
if ON_GPU:
    CASES += [
        (257, 4, 1040, torch.bfloat16, False),
        (4096, 4, 2560, torch.bfloat16, False),
        (1000, 4, 4096, torch.bfloat16, True),
        (333, 2, 272, torch.float16, False),
        (300, 4, 512, torch.float32, True),
        (130, 8, 1024, torch.bfloat16, False),
        (65, 1, 144, torch.bfloat16, False),
    ]
# Relative L2 error. Streams are rounded once; coefficients and parameter gradients stay fp32. The
# interpreter truncates to bf16 where a GPU rounds; TF32 takes part in a GPU's dx.
STREAM = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 2.5e-3 if ON_GPU else 5e-3}
# d alpha is one number, and a sum over tokens in which much cancels.
COEFFICIENT = {torch.float32: 3e-5, torch.float16: 3e-4, torch.bfloat16: 5e-4}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new floating tensors with NaN."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(make):
        def poisoned_make(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned_make

    monkeypatch.setattr(torch, "empty", fill(empty))
    monkeypatch.setattr(torch, "empty_like", fill(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(new_empty))


def inputs(tokens, n, channels, dtype, scale=1.0, logits=1.0):
    generator = torch.Generator().manual_seed(tokens + n)
    rows = n * n + 2 * n

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x, f = (rand(tokens, n, channels) * scale).to(dtype), rand(tokens, channels).to(dtype)
    weight, bias = rand(rows, n * channels) * 0.05, rand(rows) * logits
    alphas = [torch.tensor([value], device=DEVICE) for value in (0.5, 0.7, 0.9)]
    return [x, weight, bias, *alphas, f]


def reference_connection(x, weight, bias, a_pre, a_post, a_res, f, v4, iterations=20):
    logits = reference.mapping_logits(x, weight, (a_pre, a_post, a_res), bias, 1e-6)
    h = reference.mhc_mappings(logits, x.shape[1], deepseek_v4=v4, sinkhorn_iterations=iterations)
    return reference.pre(x, h.h_pre), reference.post_res(x, f, h.h_post, h.h_res), h


def triton_connection(x, weight, bias, a_pre, a_post, a_res, f, v4, iterations=20):
    layer_input, mappings = autograd.pre(
        x, weight, bias, (a_pre, a_post, a_res), Options(1e-6, iterations, v4)
    )
    return layer_input, autograd.post_res(f, mappings), mappings


def error(got, want):
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    assert got.isfinite().all()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-20)).item()


NAMES = ("x", "weight", "bias", "alpha_pre", "alpha_post", "alpha_res", "f")


def compare(tensors, dtype, v4, iterations=20):
    """Errors of outputs and gradients by name, Triton against float64."""
    exact = [t.double().requires_grad_() for t in tensors]
    ours = [t.clone().requires_grad_() for t in tensors]
    want_l, want_x, want_h = reference_connection(*exact, v4, iterations)
    got_l, got_x, got_h = triton_connection(*ours, v4, iterations)
    generator = torch.Generator().manual_seed(1)
    dl, dx = (torch.randn(o.shape, generator=generator).to(DEVICE).to(dtype) for o in (got_l, got_x))
    torch.autograd.backward([want_l, want_x], [dl.double(), dx.double()])
    torch.autograd.backward([got_l, got_x], [dl, dx])
    errors = {"layer_input": error(got_l, want_l), "streams": error(got_x, want_x)}
    for name in ("h_pre", "h_post", "h_res"):
        errors[name] = error(getattr(got_h, name), getattr(want_h, name))
    errors |= {"d " + name: error(a.grad, b.grad) for name, a, b in zip(NAMES, ours, exact, strict=True)}
    return errors


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
    x, weight, bias, *alphas, _ = ours
    layer_input, _ = autograd.pre(x, weight, bias, tuple(alphas), Options(1e-6, 20, False))
    layer_input.square().sum().backward()
    assert error(x.grad, exact[0].grad) <= 1e-5
    assert error(weight.grad, exact[1].grad) <= 1e-5


def test_second_post_res_is_refused():
    x, weight, bias, *alphas, f = inputs(2, 2, 16, torch.float32)
    _, mappings = autograd.pre(x, weight, bias, tuple(alphas), Options(1e-6, 20, False))
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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            got = step()
        for _ in range(2):
            graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
