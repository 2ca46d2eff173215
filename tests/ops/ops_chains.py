"""Several connections in a row, eager, compiled and replayed: their outputs and gradients."""

import functools

import torch
from ops_cases import DEVICE, ON_GPU, OPTIONS, each, inputs, reference_connection

from megatron_mhc.ops import autograd, boundary, reference
from megatron_mhc.ops.autograd import NextPre
from megatron_mhc.ops.kernels import HOPPER, TRITON
from megatron_mhc.ops.options import Options
from megatron_mhc.ops.triton import replay
from megatron_mhc.ops.triton.post_res import post_res_forward
from megatron_mhc.ops.triton.pre import pre_forward
from megatron_mhc.testing import ranks


def _post_res_pre(x, f, before, f_bias, weight, affine, options, norm=None, handed=None):
    """Hopper's, by Triton."""
    streams = post_res_forward(x, f.view(x[:, 0].shape), before, f_bias, parts=options.form.parts)
    layer_input, *made = pre_forward(streams, weight, affine, options, norm=norm, handed=handed)
    shape = x.shape if f.dim() == 2 else (*f.shape[:-1], x.shape[1] * x.shape[2])
    return streams.view(shape).clone(), layer_input.view(f.shape).clone(), *made  # no views, as its are none


AHEAD = TRITON._replace(post_res_pre=_post_res_pre)


def chain(tensors, ahead):
    """Output and gradients of three connections with the same parameters.

    ahead: None is the reference; else post_res makes nothing of the next one, its projection, or "all".
    """
    leaves = [(t.double() if ahead is None else t.clone()).requires_grad_() for t in tensors]
    out, weight, affine, f = leaves
    for _ in range(3):
        if ahead is None:
            layer_input, mixed, h = reference_connection(out, weight, affine, f, False)
            out = reference.post_res(out, f + layer_input, h.h_post, h.h_res)
            continue
        layer_input, mappings = autograd.pre(out, weight, affine, OPTIONS)
        next_pre = NextPre(HOPPER if ahead == "all" else TRITON, weight, affine, OPTIONS)
        out = autograd.post_res(f + layer_input, mappings, next_pre=next_pre if ahead else None)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [out, *each(torch.autograd.grad(out, leaves, g.to(out.dtype)))]


def two_in_a_row(case, linked=True, between=lambda x: x, extra=lambda x: 0.0, keep=False):
    """Gradients of two connections; `between` stands where a model has reshapes, `extra` joins the loss."""
    tokens, n, channels, dtype, v4 = case
    first, second = (
        [t.clone().requires_grad_() for t in inputs(tokens, n, channels, dtype, scale=s)] for s in (1.0, 2.0)
    )
    second[1].data.mul_(-1)
    x = first[0]
    for _, weight, affine, f in (first, second):
        layer_input, mappings = autograd.pre(x, weight, affine, Options(1e-6, 20, v4))
        x = autograd.post_res(f + layer_input * 0.5, mappings, linked=linked)
        if weight is first[1]:
            x = between(x)
            middle = x
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).to(dtype)
    loss = (x.float() * g.float()).sum() + extra(middle)
    leaves = [*first, *second[1:]]
    grads = each(torch.autograd.grad(loss, leaves, retain_graph=keep))
    return (grads, each(torch.autograd.grad(loss, leaves))) if keep else grads


def bias_like(f):
    return torch.randn(f.shape[1], generator=torch.Generator().manual_seed(5)).to(f.detach())


class Eighths(torch.autograd.Function):
    """Triton's interpreter truncates to bf16 where torch rounds: sums that bf16 holds, with gradients."""

    @staticmethod
    def forward(ctx, t):
        return t.clone() if ON_GPU or t.dtype != torch.bfloat16 else (t * 8).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


eighths = Eighths.apply


def kernels_of(n):
    return HOPPER if ON_GPU and n == 4 else AHEAD


def three_in_a_row(
    case,
    joined,
    between=lambda x, weight: x,
    loss=lambda streams: 0.0,
    keep=False,
    biased=False,
    kernels=None,
):
    """Output and gradients of three connections; `between` stands behind the first, `loss` takes all."""
    tokens, n, channels = case
    kernels = kernels or kernels_of(n)
    leaves = [t.clone().requires_grad_() for t in inputs(tokens, n, channels, torch.bfloat16)]
    x, weight, affine, f = leaves
    f_bias = eighths(bias_like(f)).requires_grad_() if biased else None
    streams, all_streams = x.view(tokens, 1, n * channels), []
    for k in range(3):
        made = boundary.taken(streams, weight, affine)
        if made is None:
            layer_input, mappings = autograd.pre(
                streams.view(tokens, n, channels), weight, affine, OPTIONS, kernels=kernels
            )
            made = layer_input.view(tokens, 1, channels), mappings
        layer_input, mappings = made
        out = eighths(f.view(layer_input.shape) + layer_input * 0.5)
        next_pre = NextPre(kernels, weight, affine, OPTIONS)
        if joined and k < 2:
            assert boundary.can_join(mappings, out, next_pre)
            streams = boundary.post_res_pre(out, mappings, next_pre, f_bias)
        else:
            streams = autograd.post_res(out, mappings, f_bias, next_pre=next_pre if k < 2 else None)
        if k == 0:
            streams = between(streams, weight)
        all_streams.append(streams)
    g = torch.randn(streams.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    total = (streams.float() * g).sum() + loss(all_streams)
    leaves += [f_bias] if biased else []
    grads = each(torch.autograd.grad(total, leaves, retain_graph=keep))
    return [streams, *grads, *(each(torch.autograd.grad(total, leaves)) if keep else [])]


def biased(case, fold, linked=True, ahead=False):
    """Output and gradients of two connections whose F has a bias, which post_res adds if `fold`."""
    tokens, n, channels, dtype = case
    x, weight, affine, f = (t.clone().requires_grad_() for t in inputs(tokens, n, channels, dtype))
    f_bias = eighths(bias_like(f)).requires_grad_()
    out = x
    for k in range(2):
        layer_input, mappings = autograd.pre(out, weight, affine, OPTIONS)
        raw = eighths(f if k == 0 else layer_input)
        raw = raw if fold else raw + f_bias
        next_pre = NextPre(TRITON, weight, affine, OPTIONS) if ahead else None
        out = autograd.post_res(raw, mappings, f_bias if fold else None, linked, next_pre)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    leaves = [x, weight, affine, f, f_bias]
    return [out, *each(torch.autograd.grad(out, leaves, g))]


def optimize(fn, backend="aot_eager", fullgraph=True, dynamic=False):
    """torch.compile, which testing.cpu takes away."""
    return torch._dynamo.optimize(backend, nopython=fullgraph, dynamic=dynamic)(fn)


def sublayer(layer_input, f):
    return layer_input * 0.5 + f


def connections(x, weight, affine, f, v4, branch=sublayer):
    """Two connections in a row around `branch`."""
    for _ in range(2):
        layer_input, mappings = autograd.pre(x, weight, affine, Options(1e-6, 20, v4))
        x = autograd.post_res(branch(layer_input, f), mappings)
    return layer_input, x


def results(run, tensors, *args):
    """Outputs and the gradient of every input."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = run(*leaves, *args)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)


def apart(test):
    """Run a test in a process of its own: one that has compiled cannot fork ranks that go backward."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        body = functools.partial(test, *args, **kwargs)
        body() if ON_GPU else ranks.run_ranks(1, body)

    return run


def run_forward(tokens, n, channels, dtype, count, forward=pre_forward):
    """Streams in front of each connection and behind the last; coefficients, f and layer input of each."""
    x, weight, affine, f = inputs(tokens, n, channels, dtype)
    streams, kept = [x], []
    for k in range(count):
        layer_input, _, mappings, _ = forward(x, weight * (k + 1), affine, OPTIONS)
        kept.append((mappings, f * (k + 1) + layer_input, layer_input))
        x = post_res_forward(x, kept[-1][1], mappings)
        streams.append(x)
    return streams, kept


def check_replay(case, behind, forward=pre_forward):
    """A replay writes the very streams and layer inputs that `forward` and post_res wrote."""
    streams, kept = run_forward(*case, forward)
    outputs = [torch.full_like(layer_input, float("nan")) for *_, layer_input in kept]
    row = [replay.Connection(m, f, out) for (m, f, _), out in zip(kept, outputs, strict=True)]
    got = replay.replay(streams[0], row, behind=behind)
    want = streams[1:] if behind else streams[1:-1]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for out, (*_, layer_input) in zip(outputs, kept, strict=True):
        assert torch.equal(out, layer_input)
