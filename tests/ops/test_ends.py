"""One hidden state to n streams and back by kernels, forward and gradients, against the reference in float64.

On a CPU in Triton's interpreter; with MEGATRON_MHC_GPU_TESTS=1 on the GPU, at larger sizes too.
"""

import pytest
import torch
from ops_cases import CASES, DEVICE, STREAM, error

from megatron_mhc import MHCConfig
from megatron_mhc.backend import Backend
from megatron_mhc.ops import reference
from megatron_mhc.ops.triton import expand_contract

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(tokens, n, channels, dtype) for tokens, n, channels, dtype, v4 in CASES if not v4]


def drawn(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def both(ours, theirs, x, g):
    """Errors of the output and the gradient of `ours`, of x, against `theirs` in float64."""
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = ours(leaf), theirs(exact)
    assert got.dtype == x.dtype and got.shape == want.shape
    got.backward(g.view_as(got))
    want.backward(g.view_as(want).double())
    return error(got, want), error(leaf.grad, exact.grad)


@pytest.mark.parametrize("tokens, n, channels, dtype", SHAPES)
def test_expand_and_its_gradient_match_float64(tokens, n, channels, dtype):
    x, g = drawn(dtype, (tokens, 1, channels), (tokens, 1, n * channels))
    errors = both(lambda t: expand_contract.expand(t, n), lambda t: reference.expand(t, n), x, g)
    assert errors[0] == 0 and errors[1] <= STREAM[dtype]


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("tokens, n, channels, dtype", SHAPES)
def test_contract_and_its_gradient_match_float64(tokens, n, channels, dtype, how):
    x, g = drawn(dtype, (tokens, n, channels), (tokens, channels))
    errors = both(lambda t: expand_contract.contract(t, how), lambda t: reference.contract(t, how), x, g)
    assert errors[0] <= STREAM[dtype] and errors[1] <= STREAM[dtype]


def test_hidden_states_that_are_no_contiguous_rows():
    (x,) = drawn(torch.float32, (3, 5, 32))
    turned = x.transpose(0, 1)
    assert torch.equal(expand_contract.expand(turned, 4), reference.expand(turned, 4))
    g = torch.ones(1, device=DEVICE).expand(5, 3, 128)
    leaf = turned.detach().clone().requires_grad_()
    expand_contract.expand(leaf, 4).backward(g)
    assert torch.equal(leaf.grad, torch.full_like(leaf, 4.0))


@pytest.mark.parametrize("backend, kernels", [("triton", True), ("reference", False)])
def test_the_backend_chooses_who_runs(monkeypatch, backend, kernels):
    ran = []
    spread, gather = expand_contract.spread, expand_contract.gather
    monkeypatch.setattr(expand_contract, "spread", lambda *a: ran.append("spread") or spread(*a))
    monkeypatch.setattr(expand_contract, "gather", lambda *a: ran.append("gather") or gather(*a))
    ends = Backend(MHCConfig(num_residual_streams=4, backend=backend))
    (x,) = drawn(torch.float32, (3, 2, 32))
    streams = ends.expand(x)
    hidden = ends.contract(streams.view(6, 4, 32))
    torch.testing.assert_close(hidden.view_as(x), x)
    assert ran == (["spread", "gather"] if kernels else [])
