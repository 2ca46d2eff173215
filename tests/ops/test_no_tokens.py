"""Zero tokens: empty tensors, zero gradients, and no launch."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from ops_cases import DEVICE, ON_GPU, inputs, norm_like

from megatron_mhc import MHCConfig
from megatron_mhc.gated import ExitMixer, GatedConnection
from megatron_mhc.handed_on import first_weights
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import link, reference
from megatron_mhc.ops.hopper import pre as hopper_pre
from megatron_mhc.ops.hopper import pre_backward as hopper_pre_backward
from megatron_mhc.ops.options import Options
from megatron_mhc.ops.triton import stage_ends
from megatron_mhc.streams import ContractHead

N, C, BF16 = 4, 16, torch.bfloat16
FORMS = {
    "paper": {},
    "deepseek_v4": dict(preset="deepseek_v4"),
    "hy_v4": dict(preset="hy_v4"),
    "identity": dict(h_res="identity"),
    "fixed": dict(h_res="identity", h_pre="fixed", h_post="fixed"),
    "fused": dict(boundary="fused"),
    "previous": dict(read="previous"),
    "hc": dict(h_res="unconstrained"),
    "gated": dict(preset="qwen4_exp"),
}
PLAIN_TORCH = {"hc", "gated"}


def config(dtype=BF16):
    return TransformerConfig(
        num_layers=1,
        hidden_size=C,
        num_attention_heads=1,
        use_cpu_initialization=not ON_GPU,
        params_dtype=dtype,
    )


def zero(parameters):
    return all(p.grad is None or not p.grad.any() for p in parameters)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize(
    "form, backend",
    [(form, backend) for form in FORMS for backend in ("reference", "triton")[: 2 - (form in PLAIN_TORCH)]],
)
def test_connections_in_a_row(poisoned, form, backend, shape):
    mhc = MHCConfig(backend=backend, **FORMS[form])
    kind = GatedConnection if form == "gated" else HyperConnectionModule
    connections = [kind(config(), mhc, k).to(DEVICE) for k in range(3)]
    leaf = torch.randn(*shape, N * C, dtype=BF16, device=DEVICE).requires_grad_()
    f = torch.randn(*shape, C, dtype=BF16, device=DEVICE).requires_grad_()
    bias = torch.randn(C, dtype=BF16, device=DEVICE).requires_grad_() if backend == "triton" else None
    streams, h_pre = leaf * 1, first_weights(leaf, N) if mhc.reads_previous else None
    for k, connection in enumerate(connections):
        layer_input, mappings = connection(streams, h_pre)
        assert layer_input.shape == (*shape, C) and mappings.h_post.shape == (0, N)
        h_pre = connection.handed_on(mappings)
        ahead = connections[k + 1].next_pre(streams, h_pre) if k < 2 else None
        streams = connection.post_res(streams, f + layer_input, mappings, bias, ahead)
        assert streams.shape == leaf.shape
    streams.float().sum().backward()
    assert leaf.grad.shape == leaf.shape and f.grad.shape == f.shape
    assert zero([p for connection in connections for p in connection.parameters()])
    assert bias is None or not bias.grad.any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("read", ["current", "previous"])
def test_a_boundary_and_an_edge_of_a_graph(poisoned, backend, read):
    connection = HyperConnectionModule(config(), MHCConfig(backend=backend, read=read), 0).to(DEVICE)
    streams = torch.randn(0, 2, N * C, dtype=BF16, device=DEVICE).requires_grad_()
    h_pre = first_weights(streams, N) if read == "previous" else None
    layer_input, mappings = connection(streams * 1, h_pre)
    u, h_post = connection.mix(streams, mappings)
    assert u.shape == streams.shape and h_post.shape == (0, N)
    (u.float().sum() + h_post.sum() + layer_input.float().sum()).backward()
    layer_input, crossing = connection.read_across(streams * 1, h_pre)
    streams_there, mappings = connection.arrived(*crossing)
    connection.post_res(streams_there, layer_input, mappings).float().sum().backward()
    assert streams.grad.shape == streams.shape and zero(connection.parameters())


@pytest.mark.parametrize("kind", [ContractHead, ExitMixer])
def test_contractions(poisoned, kind):
    mhc = MHCConfig(contract="learned_head") if kind is ContractHead else MHCConfig(preset="qwen4_exp")
    head = kind(config(), mhc).to(DEVICE)
    streams = torch.randn(0, 2, N * C, dtype=BF16, device=DEVICE).requires_grad_()
    x = reference.by_token(streams, N) if kind is ContractHead else streams
    head(x).float().sum().backward()
    assert streams.grad.shape == streams.shape and zero(head.parameters())


def test_the_receiving_end_of_a_split_boundary(poisoned):
    u, f, h_post = (torch.randn(0, *shape, dtype=BF16, device=DEVICE) for shape in ((N, C), (C,), (N,)))
    assert stage_ends.write(u, f, h_post.float()).shape == u.shape
    df, dh_post = torch.empty_like(f), torch.empty_like(h_post.float())
    stage_ends.write_backward(u, f, h_post.float(), df, dh_post)


def unlaunched(*args):
    raise AssertionError("no tokens, and a plan for their launch")


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("previous", [False, True])
def test_hoppers_launch_nothing(monkeypatch, poisoned, folds, previous):
    for module in (hopper_pre, hopper_pre_backward):
        monkeypatch.setattr(module, "_plan", unlaunched)
    x, weight, affine, f = inputs(0, N, 64, BF16)
    norm, options = norm_like(f) if folds else None, Options(1e-6, 20, False)
    h_pre = torch.randn(0, N, device=DEVICE) if previous else None
    handed = link.handed_to(h_pre)
    layer_input, saved, mappings, norm_saved = hopper_pre.pre_forward(
        x, weight, affine, options, norm, handed
    )
    streams, ahead, *_ = hopper_pre.post_res_pre(
        x, f, mappings, f.new_zeros(64), weight, affine, options, norm, handed
    )
    assert layer_input.shape == ahead.shape == f.shape and streams.shape == x.shape
    back = link.handed_back(h_pre, None)
    dx, *gradients = hopper_pre_backward.pre_backward(
        x, x, f, f, weight, affine, saved, options,
        writer=(saved, affine), norm=norm, norm_saved=norm_saved, handed=back,
    )  # fmt: skip
    assert dx.shape == x.shape and gradients[2] is None
    assert not any(g.any() for g in gradients if g is not None)
