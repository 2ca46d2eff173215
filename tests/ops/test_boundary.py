"""post_res that projects for the next connection, against float64 and against the separate kernels."""

import pytest
import torch
from ops_cases import DEVICE, ON_GPU, OPTIONS, error, inputs
from ops_chains import chain

from megatron_mhc.ops import autograd
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.kernels import TRITON
from megatron_mhc.ops.triton.post_res import post_res_forward
from megatron_mhc.ops.triton.post_res_project import post_res_project

CASES = [(5, 4, 48, False), (17, 4, 80, True), (9, 2, 32, False), (3, 1, 16, False), (0, 4, 32, False)]
if ON_GPU:
    CASES += [(4096, 4, 2560, False), (1000, 4, 4096, True), (257, 2, 1040, False), (70, 1, 272, False)]
BF16 = torch.bfloat16
# The interpreter truncates to bf16 where a GPU rounds.
STREAM, COEFFICIENT = (5e-3, 1e-3) if ON_GPU else (1e-2, 2e-2)


@pytest.mark.parametrize("tokens, n, channels, v4", CASES)
def test_output_has_the_bits_of_post_res_and_the_parts_are_its_projection(tokens, n, channels, v4):
    x, weight, _, *_, f = inputs(tokens, n, channels, BF16)
    mappings = torch.rand(tokens, n * n + 2 * n, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    out, parts, _ = post_res_project(x, f, mappings, weight)
    assert torch.equal(out, post_res_forward(x, f, mappings))
    exact = out.double().view(tokens, n * channels)
    assert error(parts[..., :-1].sum(0), exact @ weight.double().T) <= 2e-5
    assert error(parts[..., -1].sum(0), exact.square().sum(1)) <= 1e-6


@pytest.fixture
def projections(monkeypatch):
    """Counts the launches of the separate projection."""
    from megatron_mhc.ops.triton import pre

    made, original = [], pre._project
    monkeypatch.setattr(pre, "_project", lambda *args: (made.append(args), original(*args))[1])
    return made


@pytest.mark.parametrize("tokens, n, channels", [(5, 4, 48), (9, 2, 32)] + [(1000, 4, 2560)] * ON_GPU)
def test_a_chain_that_projects_ahead_matches_float64(projections, tokens, n, channels):
    tensors = inputs(tokens, n, channels, BF16)
    want = chain(tensors, None)
    apart = chain(tensors, False)
    assert len(projections) == 3
    ahead = chain(tensors, True)
    assert len(projections) == 4  # the first connection's
    for got, without, exact in zip(ahead, apart, want, strict=True):
        assert error(got, exact) <= max(1.2 * error(without, exact), COEFFICIENT)


def same(x, weight):
    return x


def change_phi(x, weight):
    weight.add_(0)  # as an optimizer step does
    return x


def change_streams(x, weight):
    return x * 1.0


def cut(x, weight):
    return x.detach()


@pytest.mark.parametrize("between, launches", [(same, 1), (change_phi, 2), (change_streams, 2), (cut, 2)])
def test_a_projection_is_taken_for_the_very_values_it_was_made_of(projections, between, launches):
    x, weight, affine, _ = inputs(5, 4, 48, BF16)
    x.requires_grad_()
    for _ in range(2):
        layer_input, mappings = autograd.pre(x, weight, affine, OPTIONS)
        next_pre = NextPre(TRITON, weight, affine, OPTIONS)
        x = between(autograd.post_res(layer_input, mappings, next_pre=next_pre), weight)
    assert len(projections) == launches


def test_other_types_and_widths_keep_the_separate_kernels(projections):
    for tensors in (inputs(3, 4, 32, torch.float32), inputs(3, 8, 16, BF16)):
        projections.clear()
        chain(tensors, True)
        assert len(projections) == 3
