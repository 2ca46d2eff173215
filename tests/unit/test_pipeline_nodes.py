"""The split boundary's two ends, and the pieces of a fused layer, against what they take apart."""

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from megatron_mhc.backend import Backend
from megatron_mhc.config import MHCConfig
from megatron_mhc.ops import reference
from megatron_mhc.pipeline.layer_nodes import Tape
from megatron_mhc.pipeline.layer_parts import cross, crossing
from megatron_mhc.pipeline.nodes import StageEntry, pack, packed_width, unpack
from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.sublayer import Visit

S, B, N, C = 6, 2, 4, 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_packed_message_carries_every_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    coefficients = reference.coefficient_dtype(torch.empty(0, dtype=dtype))
    f = torch.randn(S, B, C, generator=generator).to(dtype)
    h_post = torch.randn(S * B, N, generator=generator, dtype=torch.float64).to(coefficients)
    message = pack(f, h_post)
    assert message.shape == (S, B, packed_width(C, N, dtype)) and message.dtype == dtype
    got_f, got_h = unpack(message, C)
    assert torch.equal(got_f, f.view(S * B, C))
    assert got_h.dtype == coefficients and torch.equal(got_h, h_post)


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_entry_is_the_post_res_of_the_stage_before(dtype, error):
    """u rounded to the streams' dtype is all that differs: bf16 keeps 8 bits."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    coefficients = reference.coefficient_dtype(torch.empty(0, dtype=dtype))
    x, f = noise(S * B, N, C).requires_grad_(), noise(S * B, C).requires_grad_()
    h_post = noise(S * B, N, dtype=coefficients).requires_grad_()
    h_res = noise(S * B, N, N, dtype=coefficients).softmax(-1)
    expected = reference.post_res(x, f, h_post, h_res)
    dx = noise(S, B, N * C)
    expected.backward(dx.view_as(expected))

    u = torch.einsum("tij,tjc->tic", h_res, x.detach().to(coefficients)).to(dtype).view(S, B, N * C)
    entry = StageEntry(u, pack(f.detach().view(S, B, C), h_post), C, Backend(MHCConfig()))
    scale = expected.abs().max()
    assert (entry.streams.view_as(expected) - expected).abs().max() <= error * scale
    df, dh_post = unpack(entry.gradients(dx), C)
    torch.testing.assert_close(df, f.grad, rtol=error, atol=error)
    torch.testing.assert_close(dh_post, h_post.grad, rtol=error, atol=error)


def test_a_tape_runs_the_pieces_backward_one_by_one():
    """Also where a tensor skips a piece, as the streams skip the MLP, and where nothing needs a gradient."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = [torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    constant = torch.ones(3, dtype=torch.float64)

    def pieces(x, cut):
        a = torch.tanh(x @ weights[0])
        b, skipped, _ = cut((0, "experts"), a, a * 2, constant)
        b = torch.tanh(b @ weights[1])
        (b,) = cut((0, "post"), b)
        return (b + skipped) @ weights[2]

    pieces(x, lambda where, *tensors: tensors).square().sum().backward()
    expected = [t.grad for t in (x, *weights)]
    for tensor in (x, *weights):
        tensor.grad = None

    tape = Tape(HostStreams())
    out = pieces(x, tape.cut)
    tape.end(get_gradient_edge(out))
    tape.seed([2 * out.detach()])
    seen = []
    for where in ((0, "post"), (0, "combine"), (0, "experts"), (0, "dispatch"), (0, "attention")):
        tape.backward(where)  # a dense layer has no dispatch and no combine
        seen.append([t.grad is not None for t in (x, *weights)])
    # x, and the weights of the three pieces
    last, middle, everything = [False, False, False, True], [False, False, True, True], [True] * 4
    assert seen == [last, last, middle, middle, everything]
    for tensor, gradient in zip((x, *weights), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-14, atol=1e-14)


def test_the_tunnel_of_the_triton_operations_crosses_a_tape():
    """Their post_res hands its gradient to pre by way of a leaf; bit for bit as without cuts."""
    from megatron_mhc.ops import autograd
    from megatron_mhc.ops.options import Options

    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, weight, affine = noise(3, 4, 16), noise(24, 64), noise(27)
    f_bias = noise(16)
    leaves = (x, weight, affine, f_bias)
    dx = torch.randn(3, 4, 16, generator=generator)
    options = Options(1e-6, 3, False)

    layer_input, mappings = autograd.pre(x, weight, affine, options)
    autograd.post_res(torch.tanh(layer_input), mappings, f_bias).backward(dx)
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None

    tape = Tape(HostStreams())
    layer_input, mappings = autograd.pre(x, weight, affine, options)
    visit = Visit(x, layer_input, mappings)
    layer_input, *crossed = tape.cut((0, "experts"), layer_input, *crossing(visit))
    (f,) = tape.cut((0, "post"), torch.tanh(layer_input))
    cross(visit, crossed)
    tape.end(get_gradient_edge(autograd.post_res(f, visit.mappings, f_bias)))
    tape.seed([dx])
    for where in ((0, "post"), (0, "experts"), (0, "attention")):
        tape.backward(where)
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, expected, strict=True))
