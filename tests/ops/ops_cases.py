"""What the operations are given here, in which sizes, and how near to float64 they must come."""

import os

import torch

from megatron_mhc.ops import autograd, reference
from megatron_mhc.ops.options import Options, ReadNorm

ON_GPU = bool(os.environ.get("MEGATRON_MHC_GPU_TESTS"))
DEVICE = "cuda" if ON_GPU else "cpu"
OPTIONS = Options(1e-6, 20, False)

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


def inputs(tokens, n, channels, dtype, scale=1.0, logits=1.0):
    generator = torch.Generator().manual_seed(tokens + n)
    rows = n * n + 2 * n

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x, f = (rand(tokens, n, channels) * scale).to(dtype), rand(tokens, channels).to(dtype)
    weight, bias = rand(rows, n * channels) * 0.05, rand(rows) * logits
    return [x, weight, torch.cat([bias, torch.tensor([0.5, 0.7, 0.9], device=DEVICE)]), f]


def norm_like(f, zero_centered=False, dtype=torch.float32, eps=1e-5):
    """A norm of layer inputs like f: [T, C], whose weight is about 1."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(f.shape[-1], generator=generator) * 0.3 + (not zero_centered)
    return ReadNorm(weight.to(DEVICE, dtype), eps, zero_centered)


def each(tensors):
    """The tensors, and in the place of affine, or of its gradient, the biases and each alpha."""
    out = []
    for t in tensors:
        is_affine = t.dim() == 1 and t.numel() in (n * n + 2 * n + 3 for n in (1, 2, 4, 8))
        out += t.split([t.numel() - 3, 1, 1, 1]) if is_affine else [t]
    return out


def reference_connection(x, weight, affine, f, v4, iterations=20, norm=None):
    bias, *alphas = each([affine])
    logits = reference.mapping_logits(x, weight, alphas, bias, 1e-6)
    h = reference.mhc_mappings(logits, x.shape[1], deepseek_v4=v4, sinkhorn_iterations=iterations)
    return reference.pre(x, h.h_pre, norm), reference.post_res(x, f, h.h_post, h.h_res), h


def triton_connection(x, weight, affine, f, v4, iterations=20, norm=None):
    layer_input, mappings = autograd.pre(x, weight, affine, Options(1e-6, iterations, v4), norm=norm)
    return layer_input, autograd.post_res(f, mappings), mappings


def error(got, want):
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    assert got.isfinite().all()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-20)).item()


NAMES = ("x", "weight", "bias", "alpha_pre", "alpha_post", "alpha_res", "f")


def compare(tensors, dtype, v4, iterations=20, norm=None):
    """Errors of outputs and gradients by name, Triton against float64; with a norm, of its output."""
    tensors = tensors if norm is None else [*tensors, norm.weight]
    exact = [t.double().requires_grad_() for t in tensors]
    ours = [t.clone().requires_grad_() for t in tensors]
    norms = [norm and norm._replace(weight=leaves[-1]) for leaves in (exact, ours)]
    want_l, want_x, want_h = reference_connection(*exact[:4], v4, iterations, norms[0])
    got_l, got_x, got_h = triton_connection(*ours[:4], v4, iterations, norms[1])
    generator = torch.Generator().manual_seed(1)
    dl, dx = (torch.randn(o.shape, generator=generator).to(DEVICE).to(dtype) for o in (got_l, got_x))
    torch.autograd.backward([want_l, want_x], [dl.double(), dx.double()])
    torch.autograd.backward([got_l, got_x], [dl, dx])
    errors = {"layer_input": error(got_l, want_l), "streams": error(got_x, want_x)}
    for name in ("h_pre", "h_post", "h_res"):
        errors[name] = error(getattr(got_h, name), getattr(want_h, name))
    assert all(leaf.grad.dtype == leaf.dtype for leaf in ours)
    grads = (each([t.grad for t in tensors]) for tensors in (ours, exact))
    names = NAMES if norm is None else (*NAMES, "norm")
    got, want = grads
    errors |= {"d " + name: error(a, b) for name, a, b in zip(names, got, want, strict=True)}
    # The gradient of an alpha is one number, and of some draws nearly 0: it is judged beside all three.
    alphas = slice(names.index("alpha_pre"), names.index("alpha_res") + 1)
    size = torch.cat(want[alphas]).norm().clamp_min(1e-20)
    for name, a, b in zip(names[alphas], got[alphas], want[alphas], strict=True):
        errors["d " + name] = ((a.double() - b).norm() / size).item()
    return errors


def replayed(step):
    """What `step` returns, from the second replay of its CUDA graph on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            got = step()
        for _ in range(2):
            graph.replay()
        got = [tensor.clone() for tensor in got]  # its memory is the graph's, which ends here
    torch.cuda.synchronize()
    return got
