"""The split boundary's two ends by kernels, forward and every gradient, against the reference in float64.

On a CPU in Triton's interpreter; with MEGATRON_MHC_GPU_TESTS=1 on the GPU, at larger sizes too.
"""

import pytest
import torch
from ops_cases import (
    CASES,
    COEFFICIENT,
    DEVICE,
    ON_GPU,
    OPTIONS,
    STREAM,
    each,
    error,
    inputs,
    reference_connection,
    replayed,
)

from megatron_mhc import MHCConfig
from megatron_mhc.backend import Backend
from megatron_mhc.ops import autograd, reference
from megatron_mhc.ops.options import Options
from megatron_mhc.ops.packed import pack, unpack
from megatron_mhc.ops.triton import stage_ends
from megatron_mhc.ops.triton.pre import pre_forward
from megatron_mhc.ops.triton.pre_backward import pre_backward
from megatron_mhc.pipeline.nodes import StageEntry

pytestmark = pytest.mark.usefixtures("poisoned")
PARAMETERS = ("x", "weight", "bias", "alpha_pre", "alpha_post", "alpha_res")


def noise(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


def leaves(tensors, exact=False):
    return [(t.double() if exact else t.clone()).requires_grad_() for t in tensors]


def leave(x, weight, affine, v4=False):
    layer_input, mappings = autograd.pre(x, weight, affine, Options(1e-6, 20, v4))
    return layer_input, *autograd.mix(mappings)


def reference_leave(x, weight, affine, v4=False):
    layer_input, _, h = reference_connection(x, weight, affine, x[:, 0].detach(), v4)
    return layer_input, reference.mix(x, h.h_res), h.h_post


def enter(u, f, h_post):
    """An entry of one micro-batch of one sequence, from the messages as they travel."""
    T, n, C = u.shape
    backend = Backend(MHCConfig(num_residual_streams=n, backend="triton"))
    return StageEntry(u.reshape(T, 1, n * C), pack(f.view(T, 1, C), h_post), C, backend)


def check(errors, dtype, factor=1.0):
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        wide = name in ("layer_input", "u", "streams", "d x", "d u", "d f")
        assert value <= factor * (STREAM if wide else COEFFICIENT)[dtype], name


@pytest.mark.parametrize("tokens, n, channels, dtype, v4", CASES)
def test_exit_and_every_gradient_match_float64(tokens, n, channels, dtype, v4):
    tensors = inputs(tokens, n, channels, dtype)[:-1]
    exact, ours = leaves(tensors, exact=True), leaves(tensors)
    want, got = reference_leave(*exact, v4=v4), leave(*ours, v4=v4)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32]
    dl, du, dh_post = noise(1, *(t.shape for t in got))
    gradients = [dl.to(dtype), du.to(dtype), dh_post]
    torch.autograd.backward(want, [t.double() for t in gradients])
    torch.autograd.backward(got, gradients)
    errors = {name: error(a, b) for name, a, b in zip(("layer_input", "u", "h_post"), got, want, strict=True)}
    grads = (each([t.grad for t in tensors]) for tensors in (ours, exact))
    errors |= {"d " + k: error(a, b) for k, a, b in zip(PARAMETERS, *grads, strict=True)}
    check(errors, dtype)


@pytest.mark.parametrize("tokens, n, channels, dtype, v4", CASES)
def test_entry_and_every_gradient_match_float64(tokens, n, channels, dtype, v4):
    shape = (tokens, n, channels)
    u, dx, f, h_post = noise(tokens + n, shape, shape, (tokens, channels), (tokens, n))
    u, dx, f = u.to(dtype), dx.to(dtype), f.to(dtype)
    exact = leaves([u, f, h_post], exact=True)
    want = reference.write(*exact)
    want.backward(dx.double())
    entry = enter(u, f, h_post)
    _, message = entry.gradients(dx.view(tokens, 1, n * channels))
    assert entry.streams.dtype == message.dtype == dtype
    df, dh_post = unpack(message, channels)
    errors = {"streams": error(entry.streams.view(want.shape), want), "d u": error(dx, exact[0].grad)}
    errors |= {"d f": error(df, exact[1].grad), "d h_post": error(dh_post, exact[2].grad)}
    check(errors, dtype)

    # In rows of their own rather than of the message: the same bits.
    df_alone, dh_alone = torch.empty_like(f), torch.empty_like(h_post)
    stage_ends.write_backward(dx, f, h_post, df_alone, dh_alone)
    assert torch.equal(df_alone, df) and torch.equal(dh_alone, dh_post)
    assert torch.equal(stage_ends.write(u, f, h_post), entry.streams.view(u.shape))


def cross(tensors, dl, dx, v4=False):
    """Both ends of a boundary, in the order of a step; streams', layer input, and all gradients."""
    *ours, f = tensors
    ours = leaves(ours)
    layer_input, u, h_post = leave(*ours, v4=v4)
    entry = enter(u.detach(), f, h_post)
    df, dh_post = unpack(entry.gradients(dx.flatten(1).unsqueeze(1))[1], f.shape[1])
    torch.autograd.backward([u, h_post, layer_input], [dx, dh_post, dl])
    return [layer_input.detach(), entry.streams.view(dx.shape), *(t.grad for t in ours), df]


@pytest.mark.parametrize("tokens, n, channels, dtype, v4", CASES)
def test_exit_and_entry_are_pre_and_post_res(tokens, n, channels, dtype, v4):
    tensors = inputs(tokens, n, channels, dtype)
    exact = leaves(tensors, exact=True)
    want_l, want_x, _ = reference_connection(*exact, v4)
    dl, dx = (t.to(dtype) for t in noise(3, want_l.shape, want_x.shape))
    torch.autograd.backward([want_l, want_x], [dl.double(), dx.double()])
    got = cross(tensors, dl, dx, v4)
    names = ("layer_input", "streams", *("d " + name for name in PARAMETERS), "d f")
    got, want = each(got), each([want_l, want_x, *(t.grad for t in exact)])
    # The streams are rounded twice, as u and as x'.
    check({k: error(a, b) for k, a, b in zip(names, got, want, strict=True)}, dtype, factor=2.0)


def test_pre_backward_with_the_dh_post_that_f_makes():
    """Against the path that reads f: the same products but for the order of one sum."""
    x, weight, affine, f = inputs(5, 4, 48, torch.float32)
    _, saved, values, _ = pre_forward(x, weight, affine, OPTIONS)
    g, dl = noise(4, x.shape, f.shape)
    want = pre_backward(x, g, f, dl, weight, affine, saved, OPTIONS)
    df, dh_post = torch.empty_like(f), torch.empty_like(values[:, :4].contiguous())
    stage_ends.write_backward(g, f, values[:, 4:8], df, dh_post)
    got = pre_backward(x, g, None, dl, weight, affine, saved, OPTIONS, dh_post=dh_post)
    for a, b in zip(each(got[:3]), each(want[:3]), strict=True):
        assert error(a, b.double()) <= 1e-5


def test_results_repeat_bit_for_bit():
    tensors = inputs(*((2000, 4, 1024) if ON_GPU else (9, 4, 32)), torch.bfloat16)
    dl, dx = (t.bfloat16() for t in noise(5, tensors[-1].shape, tensors[0].shape))
    for a, b in zip(cross(tensors, dl, dx), cross(tensors, dl, dx), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_a_part_alone():
    """As where the MLP, or the next stage, hands nothing back."""
    tensors = inputs(4, 2, 16, torch.float32)[:-1]
    for part in range(3):
        exact, ours = leaves(tensors, exact=True), leaves(tensors)
        reference_leave(*exact)[part].square().sum().backward()
        leave(*ours)[part].square().sum().backward()
        assert error(ours[0].grad, exact[0].grad) <= 1e-5
        assert error(ours[1].grad, exact[1].grad) <= 1e-5 or not exact[1].grad.any()


def test_post_res_after_the_boundary_is_refused():
    x, weight, affine, f = inputs(2, 2, 16, torch.float32)
    _, mappings = autograd.pre(x, weight, affine, OPTIONS)
    autograd.mix(mappings)
    with pytest.raises(RuntimeError, match="post_res was called twice"):
        autograd.post_res(f, mappings)


def test_entry_is_plain_torch_where_the_connections_are():
    u, f, h_post = noise(6, (3, 4, 32), (3, 32), (3, 4))
    plain = Backend(MHCConfig(num_residual_streams=4, backend="reference"))
    entry = StageEntry(u.view(3, 1, -1), pack(f.view(3, 1, -1), h_post), 32, plain)
    assert torch.equal(entry.streams.view(u.shape), reference.write(u, f, h_post))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: MEGATRON_MHC_GPU_TESTS=1")
def test_replayed_graph_on_another_stream_gives_the_same_bits():
    tensors = inputs(300, 4, 1024, torch.bfloat16)
    dl, dx = (t.bfloat16() for t in noise(5, tensors[-1].shape, tensors[0].shape))
    want = cross(tensors, dl, dx)
    got = replayed(lambda: cross(tensors, dl, dx))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
