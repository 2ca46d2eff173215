"""The gated read: its own backward pass against autograd through the definition, and what it keeps."""

import pytest
import torch

from megatron_mhc.ops import gated, reference

EPS = 1e-6


def drawn(tokens, n, width, rank, dtype=torch.float64, inject=True):
    """Streams and weights of which the gates vary."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    matrices = values(rank, n * width, scale=0.3), values(n * width, rank, scale=0.8)
    inject = values(n, n * width, scale=0.3) if inject else None
    leaves = [values(tokens, n, width), values(n * width, scale=0.3), *matrices, inject]
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves]


def gradients(read, leaves, weigh=(True, True)):
    x, *weights = leaves
    found = read(x, gated.Weights(*weights), EPS)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for value, counts in zip((found.layer_input, found.h_post), weigh, strict=True):
        if value is not None and counts:
            factor = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            loss = loss + (value.double() * factor).sum()
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return found, torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("n, width, rank", [(1, 8, 3), (2, 7, 5), (4, 16, 8), (5, 6, 40)])
@pytest.mark.parametrize("inject", [True, False], ids=["connection", "mixer"])
def test_gradients_are_those_of_the_definition(n, width, rank, inject):
    leaves = drawn(9, n, width, rank, inject=inject)
    (found, got), (defined, wanted) = (gradients(read, leaves) for read in (gated.read_lean, gated.read))
    assert all(torch.equal(a, b) for a, b in zip(found, defined, strict=True) if a is not None)
    for mine, expected in zip(got, wanted, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weigh", [(True, False), (False, True)], ids=["layer_input", "h_post"])
def test_one_of_the_outputs_may_reach_no_loss(weigh):
    leaves = drawn(9, 4, 8, 3)
    (_, got), (_, wanted) = (gradients(read, leaves, weigh) for read in (gated.read_lean, gated.read))
    for mine, expected in zip(got, wanted, strict=True):
        expected = torch.zeros_like(mine) if expected is None else expected
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def test_bf16_is_near_float64():
    exact, leaves = drawn(64, 4, 32, 8), drawn(64, 4, 32, 8, torch.bfloat16)
    (found, got), (defined, wanted) = gradients(gated.read_lean, leaves), gradients(gated.read, exact)
    assert found.layer_input.dtype == torch.bfloat16 and found.h_post.dtype == torch.float32
    for mine, expected in zip((found.layer_input, *got), (defined.layer_input, *wanted), strict=True):
        error = (mine.double() - expected).norm() / expected.norm()
        assert error < 0.02


def test_autocast_changes_nothing():
    leaves = drawn(9, 4, 8, 3, torch.float32)
    found, got = gradients(gated.read_lean, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, again = gradients(gated.read_lean, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_nothing_of_the_streams_size_is_kept_but_the_streams():
    leaves = drawn(9, 4, 8, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated.read_lean(leaves[0], gated.Weights(*leaves[1:]), EPS)
    assert {t.data_ptr() for t in kept} == {leaf.data_ptr() for leaf in leaves}


def test_streams_of_equal_gates_are_read_by_their_mean():
    """As of new weights of zero: half of the mean of the normalised streams; each is written with 1."""
    x = drawn(5, 4, 8, 3)[0]
    zeros = gated.Weights(*(torch.zeros(shape).double() for shape in ((32,), (3, 32), (32, 3), (4, 32))))
    found = gated.read(x, zeros, EPS)
    unit = torch.nn.functional.rms_norm(x, (8,), eps=EPS)
    torch.testing.assert_close(found.layer_input, 0.5 * unit.mean(1))
    assert torch.equal(found.h_post, torch.ones(5, 4).double())
    assert torch.equal(found.h_pre, torch.full((5, 4), 0.125).double())
    assert torch.equal(reference.write(x, torch.zeros(5, 8).double(), found.h_post), x)
