"""The operations under torch.compile: one graph, and the bits of the eager run."""

import functools

import pytest
import torch
from ops_cases import ON_GPU, OPTIONS, each, inputs, norm_like
from ops_chains import apart, connections, optimize, results, same, sublayer

from megatron_mhc import MHCConfig
from megatron_mhc.backend import choose
from megatron_mhc.ops import autograd, compiled, reference
from megatron_mhc.ops.options import Form, Options, ReadNorm

MHC = MHCConfig()
CASES = [
    (5, 4, 48, torch.float32, False),
    (7, 4, 80, torch.bfloat16, True),
    (3, 2, 32, torch.float16, False),
    (2, 1, 16, torch.bfloat16, False),
    (0, 4, 32, torch.bfloat16, False),
]
if ON_GPU:
    CASES += [(1000, 4, 2560, torch.bfloat16, False), (65, 8, 144, torch.float32, True)]


def broken(layer_input, f):
    torch._dynamo.graph_break()
    return layer_input * 0.5 + f


def graphs():
    """How many were compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("tokens, n, channels, dtype, v4", CASES)
@apart
def test_connections_compile_to_one_graph_with_the_bits_of_eager(tokens, n, channels, dtype, v4):
    tensors = inputs(tokens, n, channels, dtype)
    compiled = optimize(connections)
    same(results(compiled, tensors, v4), results(connections, tensors, v4))
    assert graphs() == 1


@apart
def test_a_graph_that_breaks_inside_f_gives_the_same():
    """Tunnels are outputs of one graph and inputs of the next."""
    tensors = inputs(*CASES[0][:4])
    compiled = optimize(connections, fullgraph=False)
    same(results(compiled, tensors, False, broken), results(connections, tensors, False))
    assert graphs() == 3


@pytest.mark.parametrize("compiled_pre", [False, True])
@apart
def test_one_operation_compiled_and_the_other_not(compiled_pre):
    tensors = inputs(*CASES[0][:4])

    def pre(x, weight, affine):
        return autograd.pre(x, weight, affine, Options(1e-6, 20, False))

    def write(layer_input, f, mappings):
        return autograd.post_res(sublayer(layer_input, f), mappings)

    def run(*leaves, mixed=True):
        compile_ = functools.partial(optimize, fullgraph=False)
        first, second = pre, write
        if mixed:
            first, second = (compile_(pre), write) if compiled_pre else (pre, compile_(write))
        layer_input, mappings = first(*leaves[:-1])
        return layer_input, second(layer_input, leaves[-1], mappings)

    same(results(run, tensors), results(functools.partial(run, mixed=False), tensors))


@apart
def test_one_graph_serves_any_number_of_tokens():
    compiled = optimize(connections, dynamic=True)
    for tokens in (3, 6):
        tensors = inputs(tokens, 4, 32, torch.float32)
        same(results(compiled, tensors, False), results(connections, tensors, False))
    assert graphs() == 1


@apart
def test_a_norm_compiles_to_one_graph_with_the_bits_of_eager():
    def run(x, weight, affine, f, norm_weight):
        for _ in range(2):
            norm = ReadNorm(norm_weight, 1e-5, True)
            y, mappings = autograd.pre(x, weight, affine, Options(1e-6, 2, False), norm=norm)
            x = autograd.post_res(sublayer(y, f), mappings)
        return y, x

    tensors = inputs(5, 4, 48, torch.bfloat16)
    tensors.append(norm_like(tensors[-1], True, torch.bfloat16).weight)
    same(results(optimize(run), tensors), results(run, tensors))
    assert graphs() == 1


def read_behind(x, weight, affine, f, h_pre, norm_weight=None, branch=sublayer):
    """Two connections in a row that read with the weights of the one in front (--mhc-read previous)."""
    norm = None if norm_weight is None else ReadNorm(norm_weight, 1e-5, False)
    for _ in range(2):
        y, mappings = autograd.pre(x, weight, affine, Options(1e-6, 2, False), norm=norm, h_pre=h_pre)
        x, h_pre = autograd.post_res(branch(y, f), mappings), mappings.handed_on
    return y, x, h_pre


def inputs_behind(case, folds):
    tensors = inputs(*case[:4])
    h_pre = torch.rand(case[0], case[1], generator=torch.Generator().manual_seed(2))
    tensors.append(h_pre.to(tensors[0].device))
    return [*tensors, norm_like(tensors[3], dtype=case[3]).weight] if folds else tensors


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[4]])
@pytest.mark.parametrize("folds", [False, True])
@apart
def test_weights_that_are_handed_on_compile_to_one_graph_with_the_bits_of_eager(case, folds):
    tensors = inputs_behind(case, folds)
    same(results(optimize(read_behind), tensors), results(read_behind, tensors))
    assert graphs() == 1


@apart
def test_weights_are_handed_on_over_a_break():
    tensors = inputs_behind(CASES[0], False)
    run = functools.partial(read_behind, branch=broken)
    same(results(optimize(run, fullgraph=False), tensors), results(read_behind, tensors))
    assert graphs() == 3


@apart
def test_weights_that_reach_no_loss_have_no_gradient_to_give():
    def run(*leaves):
        return read_behind(*leaves)[:2]

    tensors = inputs_behind(CASES[0], False)
    same(results(optimize(run), tensors), results(run, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@apart
def test_the_choice_of_a_back_end_is_traced(dtype):
    """With all that it asks: the kernels' capabilities, the machine, and words for what cannot serve."""

    def run(x):
        return x + len(choose(MHC, x.shape[-1], x.dtype, "cuda"))

    x = torch.zeros(1, 32, dtype=dtype)
    assert torch.equal(optimize(run)(x), run(x))


@apart
def test_a_layer_input_alone_has_its_gradient():
    tensors = inputs(*CASES[0][:4])[:-1]

    def run(x, weight, affine):
        return autograd.pre(x, weight, affine, Options(1e-6, 20, False))[:1]

    same(results(optimize(run), tensors), results(run, tensors))


@apart
def test_a_second_post_res_is_refused():
    x, weight, affine, f = inputs(*CASES[0][:4])

    def run():
        _, mappings = autograd.pre(x, weight, affine, Options(1e-6, 20, False))
        return autograd.post_res(f, mappings) + autograd.post_res(f, mappings)

    with pytest.raises(Exception, match="post_res was called twice"):
        optimize(run, fullgraph=False)()


@apart
def test_ops_hold_what_torch_asks_of_custom_ops(monkeypatch):
    """Schema, fake tensors (shapes, dtypes, strides), autograd under AOTAutograd with dynamic shapes."""
    new = torch.Tensor.new_empty_strided
    # Nobody reads what is in the tunnels; the check compares them all the same.
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", lambda *args: new(*args).fill_(0))
    *tensors, f = inputs(3, 4, 32, torch.float32)
    x, weight, affine = leaves = [t.requires_grad_() for t in tensors]
    settings = *compiled.flat(OPTIONS), "triton"
    of_norm = norm_like(f).weight.requires_grad_(), 1e-5, False
    torch.library.opcheck(compiled.pre, (*leaves, *settings))
    h_pre = torch.rand(3, 4).requires_grad_()
    torch.library.opcheck(compiled.pre, (*leaves, *settings, *of_norm))
    torch.library.opcheck(compiled.pre, (*leaves, *settings, None, 0.0, False, h_pre))
    torch.library.opcheck(compiled.pre, (*leaves, *settings, *of_norm, h_pre))
    made = (t.detach() for t in compiled.pre(*leaves, *settings, *of_norm))
    layer_input, g_tunnel, f_tunnel, saved, values, norm_saved, _ = made
    tunnels = g_tunnel.requires_grad_(), f_tunnel.requires_grad_()
    torch.library.opcheck(
        compiled.post_res, (*tunnels, x, f.requires_grad_(), values, saved, affine, *Form())
    )
    g = torch.randn_like(x)
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(compiled._post_backward, (g, saved, plain[2], *Form()))
    given = plain[0], g, f.detach(), layer_input, *plain[1:], saved, norm_saved, *settings
    torch.library.opcheck(compiled._pre_backward, given)
    given = *given, of_norm[0].detach(), *of_norm[1:]
    torch.library.opcheck(compiled._pre_backward, given)
    torch.library.opcheck(compiled._pre_backward, (*given, h_pre.detach(), None))
    torch.library.opcheck(compiled._pre_backward, (*given, h_pre.detach(), torch.rand(3, 4)))


@pytest.mark.slow  # inductor calls a C++ compiler
@pytest.mark.parametrize("branch", [sublayer, broken])
@pytest.mark.parametrize("tokens, n, channels, dtype, v4", CASES[:2])
@apart
def test_inductor_gives_the_same(tokens, n, channels, dtype, v4, branch):
    tensors = inputs(tokens, n, channels, dtype)
    compiled = optimize(connections, "inductor", fullgraph=branch is sublayer)
    same(results(compiled, tensors, v4, branch), results(connections, tensors, v4))


def by_reference(x, weight, affine, f, v4):
    bias, *alphas = each([affine])
    logits = reference.mapping_logits(x, weight, alphas, bias, 1e-6)
    h = reference.mhc_mappings(logits, x.shape[1], deepseek_v4=v4)
    layer_input = reference.pre(x, h.h_pre)
    return layer_input, reference.post_res(x, sublayer(layer_input, f), h.h_post, h.h_res)


@pytest.mark.parametrize("run", [by_reference, connections])
@apart
def test_autocast_leaves_one_graph_and_its_bits(run):
    tensors = inputs(*CASES[0][:4])
    device = tensors[0].device.type

    def under_autocast(*args):
        with torch.autocast(device, torch.bfloat16):
            return run(*args)

    same(results(optimize(under_autocast), tensors, False), results(under_autocast, tensors, False))
    assert graphs() == 1
